"""The arena: host memory, allocated once and reused, in which the image of an archive is made."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable

from ckptengine.errors import StorageError

__all__ = ["Arena"]

_GRANULE = 2 << 20
"""Arenas are sized in these, so that a tail that grows by a few bytes does not ask for a new mapping."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python 3.11 has no name for it


class Arena:
    """Shared memory of at least the asked size; its address changes only when it grows.

    It is an anonymous memory file: nothing is left behind by a process that is killed. It is allocated with
    `posix_fallocate`, since a file that was only made longer promises memory that may not be there, and the
    process would be killed by SIGBUS at the first touch.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("ckptengine-arena", os.MFD_CLOEXEC)
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()
        self.nbytes = 0
        self.address = 0
        self._unpin: Callable[[], None] | None = None
        self.contents: object = None
        """What lies in it now, set by its user; None after it has moved."""

    def reserve(self, nbytes: int, *, populate: bool = False) -> None:
        """Make the arena at least this large, keeping its bytes; `populate` also maps every page of it beforehand.

        Raises `StorageError` (ENOMEM or ENOSPC) saying how much is missing; the arena then stays as it was.
        """
        with self._lock:
            if nbytes > self.nbytes:
                self._grow(-(-nbytes // _GRANULE) * _GRANULE, populate)

    def _grow(self, size: int, populate: bool) -> None:
        if self._fd < 0:
            raise StorageError(errno.EBADF, "the snapshot's memory was given back: this saver is closed")
        try:
            os.posix_fallocate(self._fd, 0, size)
            grown = mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.ftruncate(self._fd, self.nbytes)
            missing = size - self.nbytes
            raise StorageError(
                error.errno,
                f"no memory for the snapshot: {size:,} bytes are needed, {missing:,} more than are reserved; "
                "free host memory, raise the container's limit, or use more ranks per state",
            ) from error
        if populate:
            try:
                grown.madvise(_MADV_POPULATE_WRITE)
            except OSError as error:
                # An older kernel maps them at the first touch.
                if error.errno != errno.EINVAL:
                    raise StorageError(error.errno, f"no memory for the snapshot of {size:,} bytes") from error
        self._release()
        self._map, self.nbytes = grown, size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(grown))
        self.contents = None

    def view(self, position: int, nbytes: int) -> memoryview:
        """Return the bytes at a position, writable, without a copy."""
        if self._map is None or position < 0 or nbytes < 0 or position + nbytes > self.nbytes:
            raise ValueError(f"bytes {position} to {position + nbytes} lie outside of an arena of {self.nbytes}")
        return memoryview(self._map)[position : position + nbytes]

    def pin(self, pin: Callable[[int, int], Callable[[], None] | None]) -> None:
        """Have the memory pinned by a call that takes address and size and returns what undoes it, or None; once."""
        if self._unpin is None and self._map is not None:
            self._unpin = pin(self.address, self.nbytes)

    def put(self, position: int, data: bytes) -> None:
        """Put bytes at a position, growing the arena where they don't fit; what lies before stays."""
        contents = self.contents
        self.reserve(position + len(data))
        self.view(position, len(data))[:] = data
        self.contents = contents

    def abandon(self) -> None:
        """Give up a forked process's share of the memory; what pinned it belongs to the parent."""
        self._unpin = None
        self.close()

    def close(self) -> None:
        """Give the memory back; the arena can't be used afterwards. Closing twice is no error."""
        self._release()
        self.nbytes = self.address = 0
        # Forgotten before anything else may get the same number.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _release(self) -> None:
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()
        if self._map is not None:
            # A memory map refuses to close while a view of it is alive; dropping it closes it after the last.
            self._map = None
