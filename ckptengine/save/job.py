"""One save: where it goes, and what is known of it on its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ckptengine.archive.tail import build_tail
from ckptengine.catalog.manifest import utc_now
from ckptengine.catalog.site import Site
from ckptengine.save.handle import Phase, SaveHandle, SaveStats
from ckptengine.save.planner import Plan
from ckptengine.save.shares import Stored
from ckptengine.save.values import StoredValues
from ckptengine.schema.path import Path
from ckptengine.snapshot.feed import Feed
from ckptengine.snapshot.pack import Checksums
from ckptengine.snapshot.shared_arena import SharedArena
from ckptengine.storage.base import Storage

__all__ = ["Job", "ReplicaCrcs", "Target"]

ReplicaCrcs = tuple[tuple[Path, int], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint goes.

    `directory` is relative to the storage's root. `claim` is called on rank 0, where the generation is not known
    yet. `committed` is called in the background after the commit, with the generation and the attempt, on the first
    rank of each site; `told` on rank 0 before that, with the attempt and the figures, and returns at once. `site` are
    the ranks that see the storage as this one does, None: all do. `rendezvous` is the storage and directory for
    messages in jobs that have no key-value store, which all see; None: the attempt's own.
    """

    storage: Storage
    directory: str
    step: int | None
    parent: tuple[int, int] | None
    generation: int | None
    claim: Callable[[], int] | None
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    committed: Callable[[int, str], None] | None = None
    told: Callable[[str, SaveStats], None] | None = None
    site: Site | None = None
    rendezvous: tuple[Storage, str] | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank acts for those that see the storage as it does, without being rank 0."""
        return self.site is not None and self.site.leads and self.site.rank != 0

    @property
    def location(self) -> str:
        """The checkpoint's directory, as messages name it."""
        return self.storage.location(self.directory)


@dataclass(slots=True)
class Sealing:
    """The tail of an archive, made by whoever needs it first."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    tail: bytes | None = None
    stored: Stored | None = None
    """What this rank stores of what ranks share, once the tail is there."""


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
    arena: SharedArena | None = None
    """Where the image lies, if it may stay there."""
    created: str = field(default_factory=utc_now)
    """What the manifest says; wherever this attempt is committed, that is the same file."""
    replica_crcs: ReplicaCrcs = ()
    held: ExitStack = field(default_factory=ExitStack, repr=False)
    """What rank 0 holds until the end is known, and lets go of after it has told."""
    stall: float = 0.0
    error: Exception | None = None
    thread: threading.Thread | None = field(default=None, repr=False)
    phases: list[Phase] = field(default_factory=list)
    sealing: Sealing = field(default_factory=lambda: Sealing(), repr=False)

    def tail(self, rank: int) -> bytes:
        """Return the tail of this rank's archive, once the snapshot is complete; made once."""
        with self.sealing.lock:
            if self.sealing.tail is None:
                assert self.plan is not None
                assert self.values is not None
                assert self.checksums is not None
                self.sealing.stored = self.plan.shares.stored(self.values)
                entries, crcs = self.values.entries(rank, self.sealing.stored.document), self.checksums
                self.sealing.tail = build_tail(self.plan.image, entries, crcs.entries, crcs.blocks)
            return self.sealing.tail

    def phase(self, name: str, began: float) -> None:
        """Note that a phase began at a moment and ends now."""
        self.phases.append(Phase(name, began - self.started, time.monotonic() - self.started))
