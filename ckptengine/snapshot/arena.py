"""The arena: host memory, allocated once and reused, in which the image of an archive is made."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref
from collections.abc import Callable

import ckptengine._native as _native
from ckptengine.errors import StorageError
from ckptengine.snapshot.room import available_nbytes
from ckptengine.snapshot.threads import copy_threads

__all__ = ["Arena"]

_GRANULE = 2 << 20
"""Arenas are made of huge pages: an `O_DIRECT` write from single ones takes up to three times as long."""


class Arena:
    """Memory of at least the asked size, in huge pages; its address changes only when it grows.

    All of it is there from the beginning: a page that turned out to be missing in the middle of a snapshot would end
    the process. A forked process does not have it, so that no page is copied because a child might look at it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._give_back: weakref.finalize[..., Arena] | None = None
        self._unpin: Callable[[], None] | None = None
        self._refused: set[object] = set()  # the calls that could not pin this memory
        self.nbytes = 0
        self.address = 0
        self.contents: object = None
        """What lies in it now, set by its user; None after it has been replaced."""

    def reserve(self, nbytes: int) -> None:
        """Make the arena at least this large; what lies in a smaller one is lost.

        Raises `StorageError` (ENOMEM) saying how much is missing; then there is no memory in it.
        """
        with self._lock:
            if nbytes > self.nbytes:
                self._replace(-(-nbytes // _GRANULE) * _GRANULE)

    def _replace(self, size: int) -> None:
        if self._closed:
            raise StorageError(errno.EBADF, "the snapshot's memory was given back: this saver is closed")
        self._release()
        # Asked first: the system would rather end a process than refuse it memory.
        available = available_nbytes()
        try:
            if size - self._there() > available:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            # The kernel clears pages at the speed of memory, as copies go.
            address = self._map(size)
        except OSError as error:
            raise StorageError(error.errno, self._shortage(size, available)) from error
        self.address, self.nbytes = address, size
        self._give_back = weakref.finalize(self, _give_back, address, size, os.getpid())
        self._give_back.atexit = False

    def _there(self) -> int:
        """Return how many bytes of what is to be mapped are in memory already."""
        return 0

    def _map(self, size: int) -> int:
        """Return the address of memory; raises `OSError`."""
        return _native.memory_map(size, copy_threads())

    def _shortage(self, size: int, available: int) -> str:
        return (
            f"no memory for the snapshot: {size:,} bytes are needed, {available:,} are available; "
            "free some host memory, raise the container's limit, or use more ranks per state"
        )

    def view(self, position: int, nbytes: int) -> memoryview:
        """Return the bytes at a position, writable, without a copy; not to be kept."""
        if position < 0 or nbytes < 0 or position + nbytes > self.nbytes:
            raise ValueError(f"bytes {position} to {position + nbytes} lie outside of an arena of {self.nbytes}")
        return memoryview((ctypes.c_uint8 * nbytes).from_address(self.address + position)).cast("B")

    def pin(self, pin: Callable[[int, int], Callable[[], None] | None]) -> None:
        """Have the memory pinned by a call that takes address and size and returns what undoes it, or None.

        Each call is asked once for as long as the memory is the same.
        """
        with self._lock:
            if self._unpin is None and self.nbytes and pin not in self._refused:
                self._unpin = pin(self.address, self.nbytes)
                if self._unpin is None:
                    self._refused.add(pin)

    def close(self) -> None:
        """Give the memory back; the arena can't be used afterwards. Closing twice is no error."""
        self._closed = True
        self._release()

    def leave(self) -> None:
        """Forget the memory, to which a device may still write: nothing else may come there while the process lives."""
        with self._lock:
            give_back, self._give_back = self._give_back, None
            if give_back is not None:
                give_back.detach()
            self._unpin = None
            self._release()

    def abandon(self) -> None:
        """Forget the memory, in a forked process: it is the parent's."""
        self._unpin = None
        self.close()

    def _release(self) -> None:
        self.address = self.nbytes = 0
        self.contents = None
        self._refused.clear()
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


def _give_back(address: int, nbytes: int, pid: int) -> None:
    # A forked process has nothing at this address, or something else.
    if os.getpid() == pid:
        _native.memory_unmap(address, nbytes)
