"""Linux calls that Python's `os` lacks."""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["allocate", "rename_no_replace"]

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_renameat2 = getattr(_libc, "renameat2", None)
if _renameat2 is not None:
    _renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def allocate(fd: int, nbytes: int, start: int = 0) -> bool:
    """Reserve the bytes `[start, nbytes)` of a file; return False where the file system has no such operation.

    `fallocate(2)` itself, not `posix_fallocate`: glibc replaces a missing one by a write to every page, which
    doubles the I/O. Raises `OSError`, with ENOSPC where the space isn't there.
    """
    if _fallocate is None or nbytes <= start:
        return nbytes <= start
    while _fallocate(fd, 0, start, nbytes - start):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def rename_no_replace(source: str, target: str) -> bool:
    """Rename a file unless the target exists; return False where it does.

    Raises `OSError`: EINVAL or ENOSYS where kernel or file system has no such operation.
    """
    if _renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if not _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    raise OSError(code, os.strerror(code))
