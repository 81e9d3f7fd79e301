"""One save: where it goes, and what is known of it on its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ckptengine.save.handle import Phase, SaveHandle
from ckptengine.save.planner import Plan
from ckptengine.save.values import StoredValues
from ckptengine.snapshot.feed import Feed
from ckptengine.snapshot.pack import Checksums
from ckptengine.state.leaf import Path
from ckptengine.storage.base import Storage

__all__ = ["Job", "ReplicaCrcs", "Target"]

ReplicaCrcs = tuple[tuple[Path, int], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint goes.

    `directory` is relative to the storage's root. `claim` is called on rank 0, where the generation is not known
    yet. `committed` is called on rank 0 in the background after the commit.
    """

    storage: Storage
    directory: str
    step: int | None
    parent: tuple[int, int] | None
    generation: int | None
    claim: Callable[[], int] | None
    metadata: Mapping[str, Any]
    committed: Callable[[int], None] | None = None

    @property
    def location(self) -> str:
        """The checkpoint's directory, as messages name it."""
        return self.storage.location(self.directory)


@dataclass(slots=True)
class Job:
    """One save on its way through the background. Times are moments of `time.monotonic`."""

    target: Target
    generation: int
    attempt: str
    handle: SaveHandle
    deadline: float
    started: float
    waited: float
    feed: Feed
    plan: Plan | None = None
    values: StoredValues | None = None
    checksums: Checksums | None = None
    replica_crcs: ReplicaCrcs = ()
    held: ExitStack = field(default_factory=ExitStack, repr=False)
    """What rank 0 holds until the end is known, and lets go of after it has told."""
    stall: float = 0.0
    error: Exception | None = None
    thread: threading.Thread | None = field(default=None, repr=False)
    previous: threading.Thread | None = field(default=None, repr=False)
    """The thread of the save before, which may still be cleaning up."""
    phases: list[Phase] = field(default_factory=list)

    def phase(self, name: str, began: float) -> None:
        """Note that a phase began at a moment and ends now."""
        self.phases.append(Phase(name, began - self.started, time.monotonic() - self.started))
