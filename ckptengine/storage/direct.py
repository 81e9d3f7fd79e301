"""Direct I/O where the file system has it, and room on the disk before it is written to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from ckptengine.errors import StorageError
from ckptengine.storage.disk import REFUSALS
from ckptengine.storage.failure import NO_ROOM, advice_for, checked, failure
from ckptengine.storage.system import allocate

__all__ = ["directly", "reserve"]

_log = logging.getLogger("ckptengine")
_T = TypeVar("_T")

# Devices whose file system refused direct I/O: not asked again, and told once per process.
_refusing: set[int] = set()
_refusing_lock = threading.Lock()


def reserve(fd: int, nbytes: int, target: str) -> None:
    """Reserve the space of a file; a file system without that is at least asked what is free.

    Raises `StorageError` (ENOSPC, EDQUOT) saying how much is missing; the file is empty then.
    """
    code = None
    try:
        if allocate(fd, nbytes):
            return
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise failure(f"reserve {nbytes} bytes for", target, error) from error
        code = error.errno
        checked("shorten", target, lambda: os.ftruncate(fd, 0))
    free = checked("look up the free space for", target, lambda: os.fstatvfs(fd))
    available = free.f_bavail * free.f_frsize
    if code is not None or available < nbytes:
        code = code or errno.ENOSPC
        raise StorageError(
            code,
            f"{target}: {nbytes} bytes are needed and {available} are available ({os.strerror(code)}); "
            f"{advice_for(code)}",
        )


def directly(fd: int, operation: str, path: str, call: Callable[[], _T]) -> tuple[_T, bool]:
    """Run I/O with `O_DIRECT`, and again without where the file system refuses; say which it was."""
    device = checked("look up", path, lambda: os.fstat(fd)).st_dev
    if device in _refusing:
        return checked(operation, path, call), False
    try:
        _set_direct(fd, True)
        return call(), True
    except OSError as error:
        if error.errno not in REFUSALS:
            raise failure(operation, path, error) from error
        refusal = error
    checked("turn direct I/O off for", path, lambda: _set_direct(fd, False))
    result = checked(operation, path, call)
    # Only now is it known that the refusal was about direct I/O.
    with _refusing_lock:
        if device not in _refusing:
            _refusing.add(device)
            _log.warning(
                "%s: the file system refuses direct I/O (%s), so buffered I/O is used, which is slower",
                path,
                refusal.strerror,
            )
    return result, False


def _set_direct(fd: int, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
