"""When to try a download again, and what went wrong, by the error that the client of whichever storage raised."""

import errno
import secrets
import time
from typing import Any

__all__ = ["advice", "back_off", "cause_of", "is_lasting", "is_silence"]

PAUSE = 0.5  # seconds after the first attempt, about; it doubles with each
_LONGEST = 30.0

_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError, ImportError)
_DISK = {
    errno.ENOSPC: "Make room on the disk of the dataset's local folder, or set its cache_limit.",
    errno.EDQUOT: "Make room under the quota of the dataset's local folder, or set its cache_limit.",
    errno.EROFS: "Give the dataset another local folder, one that can be written.",
    errno.EIO: "The disk fails, see the system's log (dmesg): give the dataset a local folder on another.",
    errno.EMFILE: "This process may open no more files: raise its limit (ulimit -n).",
}
_PASSING = (errno.EIO, errno.EMFILE)
_TRY_AGAIN = (408, 425, 429)  # the only ones of 400..499 that pass by themselves


def back_off(attempts: int) -> None:
    """Sleep after so many ``attempts`` that failed, for 0.5 to 1.5 times 2^(attempts-1) times `PAUSE`, 45 s at most.

    Not by the random generators of users, whose state must not depend on what a server does.
    """
    time.sleep(min(PAUSE * 2 ** (attempts - 1), _LONGEST) * (0.5 + secrets.randbelow(1000) / 1000))


def is_lasting(error: BaseException) -> bool:
    """Whether trying again would end in the same way: nothing is there, or this user may not have it."""
    if isinstance(error, _LASTING) or _lacks_credentials(error):
        return True
    if getattr(error, "errno", None) in _DISK.keys() - _PASSING:
        return True
    if isinstance(error, ValueError) and str(error).startswith("Hash algorithm"):  # streaming's: an unknown one
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in _TRY_AGAIN


def is_silence(error: BaseException) -> bool:
    """Whether nothing came for as long as was to be waited."""
    cause = cause_of(error)
    return isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__


def cause_of(error: BaseException) -> BaseException:
    """``error``, or the one that it hides: s3transfer tries a few times itself."""
    cause = getattr(error, "last_exception", None)
    return cause if isinstance(cause, BaseException) else error


def advice(error: BaseException) -> str:
    """What to do about it, in a sentence."""
    status = _status(error)
    if isinstance(error, OSError) and (here := _advice_on_disk(error)):
        return here
    if _lacks_credentials(error) or status in (401, 403) or isinstance(error, PermissionError):
        return "Check the credentials of this process, and what they permit."
    if status == 404 or isinstance(error, FileNotFoundError):
        return "Check the path and the remote of the StreamingDataset."
    if "Checksum failure" in str(error) or "index.json says" in str(error):
        return "The file at the remote is damaged, or of another dataset: upload it again, with its index.json."
    return "Check the server and the network; a larger download_retry of the StreamingDataset waits for them longer."


def _advice_on_disk(error: OSError) -> str | None:
    """What to do about files of this machine; None where the error is of something else."""
    if isinstance(error, NotADirectoryError | FileExistsError) and error.filename:
        return f"{error.filename} is no folder: remove it, or give the dataset another local folder."
    if isinstance(error, PermissionError) and error.filename:
        return f"Let this user read and write {error.filename}, or give the dataset another local folder."
    return _DISK.get(error.errno or 0)


def _lacks_credentials(error: BaseException) -> bool:
    return "Credentials" in type(error).__name__ or "credentials" in str(error)


def _status(error: BaseException) -> int | None:
    """The HTTP status that ``error`` carries, in the ways of botocore, google, azure, requests and others."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        places = (response, "status_code"), (error, "status_code"), (error, "status"), (error, "code")
        found = next((value for at, name in places if isinstance(value := getattr(at, name, None), int)), None)
    return found if isinstance(found, int) and 100 <= found < 600 else None
