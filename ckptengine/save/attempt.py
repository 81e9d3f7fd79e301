"""The values that a save passes through: where it goes, what is tried, what was copied, what was committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ckptengine.archive.tail import build_tail
from ckptengine.catalog.manifest import Manifest, utc_now
from ckptengine.catalog.site import Site
from ckptengine.errors import SaveFailedError
from ckptengine.save.handle import Phase, SaveHandle, SaveStats
from ckptengine.save.planner import Plan
from ckptengine.save.shares import Stored
from ckptengine.save.values import StoredValues
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path
from ckptengine.snapshot.feed import Feed
from ckptengine.snapshot.pack import Checksums
from ckptengine.snapshot.shared_arena import SharedArena
from ckptengine.storage.base import Storage

__all__ = ["Attempt", "Committed", "Owner", "ReplicaCrcs", "Snapshot", "Tail", "Target", "Work", "interrupted"]

ReplicaCrcs = tuple[tuple[Path, int], ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that is committed. `manifest` is on rank 0, which has made it; None on the others."""

    directory: str
    generation: int
    attempt: str
    manifest: Manifest | None


class Owner(Protocol):
    """Whose checkpoints these are: a run, or a place that holds a single one."""

    def claim(self) -> int:
        """Claim the generation to write under; on rank 0, where it is not known yet."""

    def told(self, done: Committed, stats: SaveStats) -> None:
        """Hear of a commit on rank 0, before who waits for it; returns at once."""

    def committed(self, done: Committed) -> None:
        """Do what follows a commit, in the background, on the first rank of each site."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint goes.

    `directory` is relative to the storage's root. `generation` is None where `owner` has yet to claim it. `site` are
    the ranks that see the storage as this one does, None: all do. `rendezvous` is the storage and directory for
    messages in jobs that have no key-value store, which all see; None: the attempt's own.
    """

    storage: Storage
    directory: str
    step: int | None
    parent: tuple[int, int] | None
    generation: int | None
    owner: Owner
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
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


@dataclass(frozen=True, slots=True)
class Work:
    """What this rank writes: its part of the arrays, and its plain values."""

    plan: Plan
    values: StoredValues


class Tail:
    """The tail of an archive, made once, by whoever needs it first: the storage's writer, or the memory tier's.

    Not with the snapshot: training does not wait for it.
    """

    def __init__(self, work: Work, checksums: Checksums, rank: int) -> None:
        self._work, self._checksums, self._rank = work, checksums, rank
        self._lock = threading.Lock()
        self._made = b""
        self.stored = Stored({})
        """What this rank stores of what ranks share; known once the tail is made."""

    def bytes(self) -> bytes:
        """Return it."""
        with self._lock:
            if not self._made:
                plan, values, crcs = self._work.plan, self._work.values, self._checksums
                self.stored = plan.shares.stored(values)
                # What each rank has of its own says nothing of the split.
                arrays = (leaf[0] for leaf in plan.structure if leaf[3] is not Placement.PER_RANK)
                items = plan.shares.items(values, arrays)
                entries = values.entries(self._rank, self.stored.document, items)
                self._made = build_tail(plan.image, entries, crcs.entries, crcs.blocks)
            return self._made


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy that is complete, as the feed brings it to the background.

    `arena` is where the image lies, if it may stay there. `replica_crcs` are of the replicated arrays, where they are
    to be compared. `stall` is how long the call took, in seconds.
    """

    tail: Tail
    arena: SharedArena | None
    replica_crcs: ReplicaCrcs
    copied: Phase
    stall: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One save on its way through the background. Times are moments of `time.monotonic`.

    The background starts before the copy has ended: it makes its directory and its file meanwhile. So the attempt is
    whole when it starts, and what comes later travels through two of its parts: `feed` brings the windows, then the
    `Snapshot` or what went wrong with it, and `handle` tells the caller. `work` is what kept this rank from a plan
    where it has none: then the others hear of that by its receipt.
    """

    target: Target
    generation: int
    name: str
    """Its id, the same on all ranks."""
    handle: SaveHandle
    deadline: float
    started: float
    waited: float
    work: Work | Exception
    phases: tuple[Phase, ...]
    """What came before the copy."""
    feed: Feed[Snapshot]
    created: str = field(default_factory=utc_now)
    """What the manifest says; wherever this attempt is committed, that is the same file."""

    @property
    def left_for_devices(self) -> float:
        """The seconds that they may still take: then there is time left to tell the others why it ends."""
        return max(0.0, 0.9 * (self.deadline - time.monotonic()))

    def phase(self, name: str, began: float) -> Phase:
        """Return the phase that began at a moment and ends now."""
        return phase_of(name, began, self.started)


def phase_of(name: str, began: float, started: float) -> Phase:
    """Return the phase of a save, which started at a moment, that began at another and ends now."""
    return Phase(name, began - started, time.monotonic() - started)


def interrupted(problem: BaseException) -> Exception:
    """Return what is said of a save that has failed: of one that Ctrl-C, say, has ended, an error that tells so."""
    if isinstance(problem, Exception):
        return problem
    return SaveFailedError(f"it was interrupted by {type(problem).__name__}{f': {problem}' if str(problem) else ''}")
