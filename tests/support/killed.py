"""A process that is killed (kill -9) before any line of the library that a test names."""

import os
import signal
import sys


def in_a_fork(act):
    """Run ``act`` in a forked child; -> its status, as of `os.waitpid`. An error in ``act`` is code 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def killed_at(line, act, files, uncounted=()):
    """Run ``act``; this process is killed before the ``line``-th line of ``files``, without functions ``uncounted``."""
    left = line

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in files or frame.f_code.co_name in uncounted:
            return None
        if event == "line":
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
