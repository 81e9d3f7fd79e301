"""Failed system calls as errors that name the operation and the file, and say what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from ckptengine.errors import StorageError

__all__ = ["NO_ROOM", "advice_for", "checked", "failure"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What the system answers where a file system or a quota is full."""

_ADVICE = {
    errno.ENOSPC: "make room or save elsewhere",
    errno.EDQUOT: "the quota is used up: make room or save elsewhere",
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.EROFS: "the file system is mounted read-only: save elsewhere",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
    errno.EFBIG: "the file size limit is too low: see `ulimit -f`",
    errno.EIO: "the device reports an error: see the kernel's log and save elsewhere",
    errno.ESTALE: "the network file system lost the file: check the mount",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "too many open files: see `ulimit -n`",
}

_T = TypeVar("_T")


def checked(operation: str, path: str, call: Callable[[], _T]) -> _T:
    """Return what a call returns; raises `StorageError` in place of an `OSError`, see `failure`."""
    try:
        return call()
    except OSError as error:
        raise failure(operation, path, error) from error


def failure(operation: str, path: str, error: OSError) -> StorageError:
    """Return the error to raise where an operation ("write", "open") on a file has failed; it has the same `errno`."""
    code = error.errno or errno.EIO
    advice = advice_for(code)
    text = f"cannot {operation} {path}: {error.strerror or error}"
    return StorageError(code, f"{text}; {advice}" if advice else text)


def advice_for(code: int) -> str:
    """Return what a user can do about an `errno`, an empty text where nobody knows."""
    return _ADVICE.get(code, "")
