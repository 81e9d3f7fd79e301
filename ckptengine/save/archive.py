"""How an image becomes a rank's archive: written to a storage, or named in shared memory, where it lies already."""

from __future__ import annotations

import errno
import hashlib
import time

from ckptengine.archive.image import Image
from ckptengine.archive.record import ArchiveRecord
from ckptengine.errors import StorageError
from ckptengine.save.job import Job
from ckptengine.snapshot.snapshotter import Snapshotter
from ckptengine.storage.base import join

__all__ = ["MemoryArchive", "StorageArchive", "record_of"]


class StorageArchive:
    """Writes the windows of an image as they come, then the tail. Called with a job and its attempt's directory."""

    def __init__(self, rank: int, snapshotter: Snapshotter) -> None:
        self._rank, self._snapshotter = rank, snapshotter

    def __call__(self, job: Job, data: str) -> ArchiveRecord:
        """Return the record of the archive, which is durable; raises what the snapshot or the storage did."""
        assert job.plan is not None
        image = job.plan.image
        name, window_nbytes = join(data, image.name), self._snapshotter.window_nbytes(image)
        with job.target.storage.create_archive(name, image.fixed_nbytes, write_nbytes=window_nbytes) as archive:
            began = None
            for window in job.feed:
                began = began or time.monotonic()
                archive.write(window.address, window.end - window.begin, window.begin)
            tail = job.tail(self._rank)
            archive.write(self._snapshotter.tail(tail), len(tail), image.fixed_nbytes)
            archive.finish()
        job.phase("write", began or time.monotonic())
        return record_of(image, tail)


class MemoryArchive:
    """Gives the complete image its name in the memory tier; no byte is copied."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, job: Job, data: str) -> ArchiveRecord:
        """Return the record of the archive; raises `StorageError` where the image is not in shared memory."""
        began = time.monotonic()
        assert job.plan is not None
        image, storage = job.plan.image, job.target.storage
        if job.arena is None:
            raise StorageError(errno.ENOSPC, f"{storage.location()} had no room for the image")
        tail = job.tail(self._rank)
        storage.make_directory(data)
        job.arena.publish(storage.location(join(data, image.name)), image.fixed_nbytes, tail)
        job.phase("write", began)
        return record_of(image, tail)


def record_of(image: Image, tail: bytes) -> ArchiveRecord:
    """Return the record of an archive that is its image and a tail."""
    nbytes = image.fixed_nbytes + len(tail)
    return ArchiveRecord(image.name, nbytes, image.fixed_nbytes, hashlib.sha256(tail).hexdigest())
