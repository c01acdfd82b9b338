"""What nobody should run."""

from pathlib import Path


class Bomb:
    """Makes the file it is told when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
