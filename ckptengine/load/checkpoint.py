"""One committed checkpoint, open for reading."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from ckptengine.archive.layout_file import StoredRows, open_layout
from ckptengine.archive.names import OBJECTS, rank_node
from ckptengine.archive.reader import Archive, check_size, open_archive
from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import CheckpointDamagedError, ForeignFormatError, LoadMismatchError
from ckptengine.foreign.checkpoint import ForeignCheckpoint
from ckptengine.storage.base import StorageView, join

__all__ = ["Checkpoint", "Opened", "naming"]


@contextlib.contextmanager
def naming(location: str) -> Iterator[None]:
    """Have every error that says what is wrong with a checkpoint also say with which."""
    try:
        yield
    except (CheckpointDamagedError, ForeignFormatError, LoadMismatchError) as error:
        if location in str(error):
            raise
        named = type(error)(f"{location}: {error}")
        if isinstance(error, LoadMismatchError) and isinstance(named, LoadMismatchError):
            named.report = error.report
        raise named from error


class Checkpoint:
    """A checkpoint whose manifest has been read; everything else is read when it is asked for, and verified.

    `directory` is the checkpoint's, relative to the storage.
    """

    def __init__(self, storage: StorageView, directory: str, manifest: Manifest) -> None:
        self.storage = storage
        self.directory = directory
        self.manifest = manifest
        self._archives: dict[int, Archive] = {}
        self._rows: StoredRows | None = None
        self._shared: dict[str, Any] | None = None

    @property
    def step(self) -> int | None:
        """The step, None for a single checkpoint."""
        return self.manifest.step

    @property
    def generation(self) -> int:
        """The life of the run that it was saved in."""
        return self.manifest.generation

    @property
    def location(self) -> str:
        """The directory, as messages name it."""
        return self.storage.location(self.directory)

    def file(self, name: str) -> str:
        """Return a file of this checkpoint's attempt, relative to the storage."""
        return join(attempt_directory(self.directory, self.manifest.attempt), name)

    def archive(self, rank: int) -> Archive:
        """Return the archive of a rank that saved, with its tail verified."""
        if rank not in self._archives:
            record = self.manifest.archives[rank]
            self._archives[rank] = open_archive(self.storage, self.file(record.name), record)
        return self._archives[rank]

    @property
    def rows(self) -> StoredRows:
        """Which box of which leaf lies where: the layout file, of which each part is verified when it is read."""
        # Not a `cached_property`: all of a class share one lock, and one that hangs would hold up every load.
        if self._rows is None:
            self._rows = self._read_rows()
        return self._rows

    def _read_rows(self) -> StoredRows:
        record = self.manifest.layout
        fixed_nbytes = [archive.tail_position for archive in self.manifest.archives]
        name = self.file(record.name)
        with naming(self.storage.location(name)):
            rows = open_layout(self.storage, name, record, fixed_nbytes)
        # Each element is stored once, so what is allocated for the arrays is bounded by the files that are there.
        claimed = sum(math.prod(leaf.shape) * leaf.itemsize for leaf in rows.leaves)
        if claimed > sum(fixed_nbytes):
            raise CheckpointDamagedError(
                f"{self.storage.location(name)}: its arrays would take {claimed:,} bytes, the archives have "
                f"{sum(fixed_nbytes):,}"
            )
        return rows

    @property
    def shared(self) -> dict[str, Any]:
        """The replicated values, as rank 0 has stored them: `manifest.value_ranks` have the rest."""
        if self._shared is None:
            self._shared = self.archive(0).attributes(OBJECTS)
        return self._shared

    def shared_of(self, rank: int) -> dict[str, Any]:
        """Return the part of the replicated values that a rank besides 0 has stored, as stored."""
        stored = self.own(rank).get("shared", {})
        if type(stored) is not dict:
            raise CheckpointDamagedError(f"{self.archive(rank).location}: what it shares is no object")
        return stored

    def own(self, rank: int) -> dict[str, Any]:
        """Return the values of one rank that saved, as stored."""
        return self.archive(rank).attributes(rank_node(rank))

    def check_files(self) -> None:
        """Check that every file is there with its size; raises `CheckpointDamagedError` naming the first that isn't."""
        for record in (self.manifest.layout, *self.manifest.archives):
            check_size(self.storage, self.file(record.name), record)


Opened = Checkpoint | ForeignCheckpoint
"""What a load reads: a checkpoint of ours, or one of another library that was described in the same words."""
