"""An arena that outlives its process: a file in shared memory, which becomes the archive when the image is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable

import ckptengine._native as _native
from ckptengine.errors import StorageError
from ckptengine.snapshot.arena import Arena
from ckptengine.snapshot.threads import copy_threads
from ckptengine.storage.failure import failure
from ckptengine.storage.system import allocate

__all__ = ["SharedArena", "is_locked", "remove_unused"]


class SharedArena(Arena):
    """The file `path` of a tmpfs as an arena; locked while a process has it, so that the next one knows.

    The lock is the kernel's (`flock`): it ends with the process, also by SIGKILL. What was published of the file has
    a second name, under which it is a whole archive. Raises `StorageError`, EBUSY where another process has the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.left = False
        """Whether `leave` was called."""
        self._whole_nbytes = 0  # up to where the file's pages are those that were pinned
        try:
            self._fd = _locked(path)
        except BlockingIOError as error:
            raise StorageError(errno.EBUSY, f"{path}: another process uses it") from error
        except OSError as error:
            raise StorageError(error.errno, f"cannot open {path}: {error.strerror}") from error

    def pin(self, pin: Callable[[int, int], Callable[[], None] | None]) -> None:
        """Have the memory pinned; see `Arena.pin`."""
        if self._unpin is None:
            self._whole_nbytes = self.nbytes
        super().pin(pin)

    def begin(self, nbytes: int) -> None:
        """Make a reserved arena ready to be filled again with `nbytes`, after its second name was removed.

        Raises `StorageError` (ENOSPC) where what a tail had cut off can't be had again.
        """
        if nbytes > self._whole_nbytes and self._unpin is not None:
            # A device would write to the pages that were cut off, and the archive would have those that came after.
            unpin, self._unpin = self._unpin, None
            unpin()
        try:
            # All up to the present end is there: looking at each page anew would cost a third of the copy.
            self._grow(self.nbytes, os.fstat(self._fd).st_size)
        except OSError as error:
            nbytes = self.nbytes
            self._release()
            raise StorageError(error.errno, self._shortage(nbytes, 0)) from error

    def publish(self, target: str, position: int, tail: bytes) -> None:
        """Make the file a whole archive: its bytes up to `position`, then `tail`; and give it a second name."""
        try:
            os.ftruncate(self._fd, position + len(tail))
            self._whole_nbytes = min(self._whole_nbytes, position + len(tail))
            view, place = memoryview(tail), position
            while view:
                written = os.pwrite(self._fd, view, place)
                view, place = view[written:], place + written
            os.link(self.path, target)
        except OSError as error:
            raise StorageError(error.errno, f"cannot publish {target} in shared memory: {error.strerror}") from error

    def is_file(self, path: str) -> bool:
        """Return whether a name is one of this arena's file."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._fd))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise failure("look up", path, error) from error

    def leave(self) -> None:
        """Forget the memory, as `Arena.leave`; its file, which has the same pages, is used no more either."""
        super().leave()
        self.left = self._closed = True
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def empty(self) -> None:
        """Give the memory of an arena that nothing was published of back to the machine; the file stays."""
        self._release()
        if not self._closed:  # else a device may still write to the pages
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)

    def remove(self) -> None:
        """Give the memory back to the machine, unless it was published: then its second name keeps it."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Give the mapping and the lock back; the file stays."""
        super().close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _there(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def _map(self, size: int) -> int:
        self._grow(size)
        return _native.memory_map(size, copy_threads(), self._fd)

    def _grow(self, size: int, start: int = 0) -> None:
        """Give the file its length, every page of it: one that turned out to be missing would end the process.

        Up to `start` they are there.
        """
        if os.fstat(self._fd).st_size != size:
            os.ftruncate(self._fd, size)
        allocate(self._fd, size, start)

    def _shortage(self, size: int, available: int) -> str:
        folder = os.path.dirname(self.path)
        free = os.statvfs(folder)
        return (
            f"no room for an image of {size:,} bytes in {folder}: {free.f_bavail * free.f_frsize:,} "
            f"bytes of shared memory and {available:,} of memory are free; enlarge it (docker run --shm-size; "
            "mount -o remount,size=), or leave memory=True out"
        )


def is_locked(path: str) -> bool:
    """Return whether a process has an arena's file, by any of its names; one that is missing is not locked.

    Raises `StorageError` where that can't be told: what nobody has is deleted.
    """
    try:
        os.close(_locked(path, 0))
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise failure("look whether a process has", path, error) from error
    return False


def remove_unused(path: str) -> None:
    """Remove an arena's file that no process has and nothing was published of; raises `OSError`."""
    try:
        fd = _locked(path, 0)
    except (BlockingIOError, FileNotFoundError):
        return
    try:
        if os.fstat(fd).st_nlink == 1:
            os.unlink(path)
    finally:
        os.close(fd)


def _locked(path: str, create: int = os.O_CREAT) -> int:
    """Return a descriptor that holds the lock of what has this name now; raises `OSError`: EAGAIN where it is taken."""
    while True:
        fd = os.open(path, os.O_RDWR | create | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been removed between the two calls, by who held the lock until then.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(fd)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
