"""A checkpoint by itself, which replaces the one before it at its place."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.catalog.listing import committed, next_generation, read_manifest
from ckptengine.catalog.retention import remove_leftovers, replace_older
from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.save.attempt import Committed, Target
from ckptengine.save.handle import SaveStats
from ckptengine.storage.base import Storage

__all__ = ["single_checkpoint"]

_log = logging.getLogger("ckptengine")


def single_checkpoint(
    storage: Storage, metadata: Mapping[str, Any] | None, afterwards: Callable[[], Sequence[str]] | None = None
) -> Target:
    """Return where a save goes that makes a storage's root a checkpoint; what is there is replaced after the commit.

    `afterwards` is called after that, in the background, and returns what it could not do. A root that holds a run is
    refused by the save, with `StorageError` (EEXIST).
    """
    return Target(
        storage=storage,
        directory="",
        step=None,
        parent=None,
        generation=None,
        owner=_Single(storage, afterwards),
        metadata=dict(metadata or {}),
    )


@dataclass(frozen=True, slots=True)
class _Single:
    """The owner of the one checkpoint at a storage's root."""

    storage: Storage
    afterwards: Callable[[], Sequence[str]] | None

    def claim(self) -> int:
        """Return the next generation; raises where a run lies there, or nobody may write."""
        _refuse_run(self.storage)
        self.storage.check_writable()
        return next_generation(self.storage)

    def told(self, done: Committed, stats: SaveStats) -> None:
        """Do nothing: who saves has the handle."""

    def committed(self, done: Committed) -> None:
        """Delete what the checkpoint replaces, and what earlier attempts have left."""
        problems = [*replace_older(self.storage, done.generation), *remove_leftovers(self.storage)]
        for problem in (*problems, *(self.afterwards() if self.afterwards is not None else ())):
            _log.warning("%s: %s", self.storage.location(), problem)


def _refuse_run(storage: Storage) -> None:
    """Raise where a single checkpoint would replace those of a run."""
    for entry in committed(storage):
        try:
            step = entry.step if entry.step is not None else read_manifest(storage, entry).step
        except CheckpointDamagedError:
            continue  # nothing is lost by replacing that
        if step is not None:
            raise StorageError(
                errno.EEXIST,
                f"{storage.location()} holds step {step} of a run, which a single checkpoint must not replace: save "
                "to another path, or into the run with ckptengine.Checkpointer",
            )
