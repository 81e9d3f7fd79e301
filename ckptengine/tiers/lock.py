"""One process at a time works on a directory; the others wait until it is done."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator

from ckptengine.errors import DeadlineError
from ckptengine.storage.failure import failure

__all__ = ["locked"]

_LOOK = 0.1
"""Seconds between two tries: flock can't wait for a bounded time."""


@contextlib.contextmanager
def locked(path: str, timeout: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing and stays; a process that dies lets go of it.

    `waiting` is called once, with who holds it, where that is another. Raises `DeadlineError` after `timeout` seconds,
    `StorageError` where the file can't be made or the file system knows no locks.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise failure("open", path, error) from error
    try:
        deadline, told = time.monotonic() + timeout, False
        while not _take(fd, path):
            if not told:
                waiting(_holder(fd))
                told = True
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"{path}: {_holder(fd)} has held this lock for {timeout:g} s; wait longer (--timeout)"
                )
            time.sleep(_LOOK)
        # For the others' messages only.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(fd)


def _take(fd: int, path: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
            return False
        raise failure("lock", path, error) from error


def _holder(fd: int) -> str:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return f"process {int(holder['pid'])} on {holder['host']!s:.255}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
