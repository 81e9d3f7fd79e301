"""From a state's memory to windows of its image: eagerly, under overlap, or through less memory than the image."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ckptengine.archive.image import BLOCK_NBYTES, Image
from ckptengine.errors import DeadlineError, DeviceError, StorageError
from ckptengine.frameworks.registry import adapters
from ckptengine.snapshot.arena import Arena
from ckptengine.snapshot.feed import Feed, Window
from ckptengine.snapshot.pack import Checksums, CopyTable, Rows
from ckptengine.snapshot.shared_arena import SharedArena

__all__ = ["LEAST_ARENA_NBYTES", "Images", "Snapshotter", "on_same_devices"]

LEAST_ARENA_NBYTES = 16 << 20
"""Below this a bounded arena would spend its time on calls instead of bytes."""

_log = logging.getLogger("ckptengine")


class Images(Protocol):
    """Memory for images that outlives the process; `ckptengine.tiers.memory.MemoryTier` has it."""

    def take(self, nbytes: int) -> SharedArena | None:
        """Return an arena of at least `nbytes` for the next image, or None where there is no room."""

    def prepare(self, nbytes: int, ready: Callable[[Arena], None] | None) -> None:
        """Have that memory there before it is needed; `ready` is called with each piece of it."""

    def abandon(self) -> None:
        """Forget it, in a forked process."""


class Snapshotter:
    """Owns the arena of one saver. `limit` bounds it, in bytes; None: as large as the image.

    With `images`, an image lies in one of those wherever there is room; `shared` is the one of the last snapshot.
    """

    def __init__(self, limit: int | None = None, images: Images | None = None) -> None:
        self._private = self._arena = Arena()
        self.shared: SharedArena | None = None
        self._images = images
        self._tail = Arena()
        self._limit = limit
        self._told = False
        self._preparing: threading.Thread | None = None

    def prepare(self, nbytes: int, pinned: bool) -> None:
        """Reserve memory for a snapshot of about `nbytes` in the background, and pin it; `reserve` waits for that."""
        nbytes = nbytes if self._limit is None else min(nbytes, self._limit)

        def populate() -> None:
            if self._images is not None:
                self._images.prepare(nbytes, _pin if pinned else None)
                return
            try:
                self._private.reserve(nbytes)
            except StorageError as error:
                _log.info("the snapshot's memory can't be prepared in advance: %s", error)
                return
            if pinned:
                _pin(self._private)

        self._prepare_by(on_same_devices(populate) if pinned else populate)

    def _prepare_by(self, call: Callable[[], None]) -> None:
        thread = threading.Thread(target=call, name="ckptengine-arena", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be had: then the save reserves it
            thread.start()
            self._preparing = thread

    def reserve(self, image: Image, timeout: float) -> bool:
        """Reserve memory for an image; return whether it is there for the whole of it.

        Where memory is short, the snapshot goes through what there is: from `LEAST_ARENA_NBYTES` on. Raises
        `StorageError` saying how much is missing where there isn't even that, and `DeadlineError`.
        """
        if not self._prepared(timeout):
            raise DeadlineError(f"the snapshot's memory is still being prepared, or pinned, after {timeout:g} s")
        self.shared = None if self._images is None else self._images.take(image.fixed_nbytes)
        self._arena = self.shared or self._private
        if self.shared is not None:
            return True
        if self._limit is not None and self._limit < image.fixed_nbytes:
            self._arena.reserve(self._limit)
            return False
        try:
            self._arena.reserve(image.fixed_nbytes)
            return True
        except StorageError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOSPC):
                raise
            self._reserve_less(image.fixed_nbytes, error)
            return False

    def _prepared(self, timeout: float) -> bool:
        """Return whether what `prepare` has begun ends in some seconds: until then the memory is that thread's."""
        if self._preparing is not None:
            self._preparing.join(timeout)
            if self._preparing.is_alive():
                return False
            self._preparing = None
        return True

    def _reserve_less(self, whole: int, shortage: StorageError) -> None:
        nbytes = whole
        while nbytes > LEAST_ARENA_NBYTES:
            nbytes = max(nbytes // 2, LEAST_ARENA_NBYTES)
            try:
                self._arena.reserve(nbytes)
                break
            except StorageError:
                continue
        if self._arena.nbytes < LEAST_ARENA_NBYTES:
            raise shortage
        if not self._told:
            self._told = True
            _log.warning(
                "%s. Until then the snapshot uses %s bytes and runs at the storage's speed, and training waits for it",
                shortage,
                f"{self._arena.nbytes:,}",
            )

    def window_nbytes(self, image: Image) -> int | None:
        """Return the bytes of the windows in which an image comes through a bounded arena; None: all at once."""
        if self._limit is None or self._limit >= image.fixed_nbytes:
            return None
        return self._limit // 2 // BLOCK_NBYTES * BLOCK_NBYTES

    def mark(self, table: CopyTable, whole: bool) -> None:
        """Have an image follow what devices have been given so far, where another thread is to fill it."""
        if table.has_devices:
            if whole:
                _pin(self._arena)
            table.mark()

    def fill(self, table: CopyTable, checksums: Checksums, timeout: float) -> None:
        """Fill the reserved memory with an image, all but what is fenced; `bring` and `complete` follow.

        This and they raise `DeviceError`, also where a device does not answer for some seconds.
        """
        image, arena = table.image, self._arena
        if table.has_devices:
            _pin(arena)
        if arena.contents is not image:
            for position, data in image.static:
                arena.view(position, len(data))[:] = data
            arena.contents = image
        with self._memory_left(table):
            table.begin(arena.address, timeout)
        table.fill(Rows.NOW, arena.address, checksums)

    def bring(self, table: CopyTable, checksums: Checksums, timeout: float) -> None:
        """Fill in what only an optimizer's step changes; the step waits until this is done."""
        with self._memory_left(table):
            table.begin_fenced(timeout)
            try:
                table.fill(Rows.FENCED, self._arena.address, checksums)
            finally:
                table.wait(timeout)

    @contextlib.contextmanager
    def _memory_left(self, table: CopyTable) -> Iterator[None]:
        """Leave the memory to a device that may still write to it: the next image comes into other memory."""
        try:
            yield
        except BaseException as error:
            if table.under_way or (isinstance(error, DeviceError) and error.under_way):
                self._arena.leave()
            raise

    def complete(self, table: CopyTable, checksums: Checksums, feed: Feed[Any]) -> None:
        """Checksum what came from devices, and feed the windows; nothing waits for this but the writer."""
        address = self._arena.address
        table.fill(Rows.DEVICE, address, checksums)
        table.seal(address, checksums)
        feed.put(Window(0, table.image.fixed_nbytes, address))

    def stream(self, table: CopyTable, checksums: Checksums, feed: Feed[Any], timeout: float) -> None:
        """Bring an image through memory that is smaller: one half of that is filled while the other is written.

        Returns when all is copied, which takes about as long as the storage takes.
        """
        image, arena = table.image, self._arena
        arena.contents = None
        half = arena.nbytes // 2 // BLOCK_NBYTES * BLOCK_NBYTES
        starts = [position for position, _ in image.static]
        for number, begin in enumerate(range(0, image.fixed_nbytes, half)):
            end = min(begin + half, image.fixed_nbytes)
            feed.wait_taken(number - 1)
            offset = number % 2 * half
            self._put_static(image, starts, begin, end, offset)
            address = arena.address + offset
            table.fill_window(address, checksums, begin, end, timeout)
            table.seal(address, checksums, begin, end)
            feed.put(Window(begin, end, address))

    def _put_static(self, image: Image, starts: Sequence[int], begin: int, end: int, offset: int) -> None:
        """Put the bytes that no save changes into the window `[begin, end)` at an offset of the arena."""
        first = max(0, bisect_right(starts, begin) - 1)
        for position, data in image.static[first : bisect_left(starts, end)]:
            low, high = max(position, begin), min(position + len(data), end)
            if low < high:
                self._arena.view(offset + low - begin, high - low)[:] = data[low - position : high - position]

    def tail(self, tail: bytes) -> int:
        """Put an archive's tail into memory that can be written from, and return its address."""
        self._tail.reserve(len(tail))
        self._tail.view(0, len(tail))[:] = tail
        return self._tail.address

    def close(self, timeout: float) -> bool:
        """Give the memory back, unless it is still being prepared after some seconds; return whether it was not."""
        prepared = self._prepared(timeout)
        if prepared:
            self._private.close()
        self._tail.close()
        return prepared

    def abandon(self) -> None:
        """Forget the memory, in a forked process: it is the parent's."""
        self._private.abandon()
        if self._images is not None:
            self._images.abandon()
        self._tail.abandon()


def on_same_devices(call: Callable[[], None]) -> Callable[[], None]:
    """Return a call that does the same with this thread's devices, for another one, which would begin with others."""
    contexts = [adapter.same_device() for adapter in adapters()]

    def there() -> None:
        with contextlib.ExitStack() as devices:
            for context in contexts:
                devices.enter_context(context())
            call()

    return there


def _pin(arena: Arena) -> None:
    """Have an arena's memory pinned for copies from devices, where a framework can."""
    for adapter in adapters():
        arena.pin(adapter.pin_host_memory)
