"""Writes down what a Python process, and those that it starts, change in the file system.

For ``PYTHONPATH``; WATCH_LOG names a file, which gets a line for each change: "made" or "changed" (what existed before
is written to, removed, moved or replaced), a tab, and the path.
"""

import os
import sys

_CHANGES = {"os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime", "shutil.rmtree"}
_CREATES = {"os.mkdir"}
_PAIRS = {"os.rename", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _tell(path, event=""):
    if isinstance(path, int) or path is None:
        return
    path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
    what = "changed" if os.path.lexists(path) else "made"
    if what == "changed" and event == "os.mkdir":  # it fails, as it should
        return
    os.write(_log, f"{what}\t{path}\n".encode(errors="surrogateescape"))


def _watch(event, args):
    if event == "open":
        path, _, flags = args
        if flags & _WRITING:
            _tell(path)
    elif event in _CHANGES or event in _CREATES:
        beside = args[-1]
        if event not in {"os.remove", "os.rmdir", "os.mkdir"} or beside == -1:  # else within a tree that was told of
            _tell(args[0], event)
    elif event in _PAIRS:
        if event == "os.rename":
            _tell(args[0])
        _tell(args[1])


_log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(_watch)
