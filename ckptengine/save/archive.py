"""How an image becomes a rank's archive: written to a storage, or named in shared memory, where it lies already."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from ckptengine.archive.image import Image
from ckptengine.archive.record import ArchiveRecord
from ckptengine.errors import StorageError
from ckptengine.save.attempt import Attempt, Snapshot
from ckptengine.save.handle import Phase
from ckptengine.snapshot.snapshotter import Snapshotter
from ckptengine.storage.base import join

__all__ = ["Archived", "MemoryArchive", "StorageArchive", "Writer", "record_of"]


@dataclass(frozen=True, slots=True)
class Archived:
    """This rank's archive, durable where it lies."""

    record: ArchiveRecord
    snapshot: Snapshot
    written: Phase


Writer = Callable[[Attempt, Image, str], Archived]
"""Makes an archive of an attempt, given its image and the attempt's directory."""


class StorageArchive:
    """Writes the windows of an image as they come, then the tail."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def __call__(self, attempt: Attempt, image: Image, data: str) -> Archived:
        """Return the archive, which is durable; raises what the snapshot or the storage did."""
        name, window_nbytes = join(data, image.name), self._snapshotter.window_nbytes(image)
        storage = attempt.target.storage
        try:
            with storage.create_archive(name, image.fixed_nbytes, write_nbytes=window_nbytes) as archive:
                began = None
                for window in attempt.feed:
                    began = began or time.monotonic()
                    archive.write(window.address, window.end - window.begin, window.begin)
                snapshot = attempt.feed.whole()
                tail = snapshot.tail.bytes()
                archive.write(self._snapshotter.tail(tail), len(tail), image.fixed_nbytes)
                archive.finish()
        finally:
            attempt.feed.give_up()
        return Archived(record_of(image, tail), snapshot, attempt.phase("write", began or time.monotonic()))


class MemoryArchive:
    """Gives the complete image its name in the memory tier; no byte is copied."""

    def __call__(self, attempt: Attempt, image: Image, data: str) -> Archived:
        """Return the archive; raises what the snapshot did, `StorageError` where it is not in shared memory."""
        began, storage, snapshot = time.monotonic(), attempt.target.storage, attempt.feed.whole()
        if snapshot.arena is None:
            raise StorageError(errno.ENOSPC, f"{storage.location()} had not enough space for the image")
        tail = snapshot.tail.bytes()
        storage.make_directory(data)
        snapshot.arena.publish(storage.location(join(data, image.name)), image.fixed_nbytes, tail)
        return Archived(record_of(image, tail), snapshot, attempt.phase("write", began))


def record_of(image: Image, tail: bytes) -> ArchiveRecord:
    """Return the record of an archive that is its image and a tail."""
    nbytes = image.fixed_nbytes + len(tail)
    return ArchiveRecord(image.name, nbytes, image.fixed_nbytes, hashlib.sha256(tail).hexdigest())
