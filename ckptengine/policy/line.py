"""The line of a run that a job's saves go on from."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ckptengine.catalog.listing import step_directory
from ckptengine.errors import StateError
from ckptengine.policy.hook import CommitHooks
from ckptengine.policy.opening import Opening
from ckptengine.policy.saves import Saves
from ckptengine.save.attempt import Committed, Target
from ckptengine.save.handle import SaveStats
from ckptengine.save.saver import Saver
from ckptengine.tiers.tiers import Tiers

__all__ = ["Line", "Standing"]


class Line:
    """From which checkpoint each life of the run goes on, under which generation, and how far it has come.

    A life begins with the process, and with each restore. `parent` is the generation and step that it was restored
    from, None for one that has begun anew. `started` tells whether a snapshot was ever taken in this process.
    """

    def __init__(self, run: str, tiers: Tiers, hooks: CommitHooks) -> None:
        self._run, self._tiers, self._hooks = run, tiers, hooks
        self.parent: tuple[int, int] | None = None
        self.started = False
        self._life = 0
        self._generation: int | None = None
        self._highest: int | None = None  # the highest step that this life has begun to save
        self._claimed: dict[int, int] = {}  # on rank 0, the generation of a life
        self._claiming = threading.Lock()

    def restart(self, parent: tuple[int, int] | None) -> None:
        """Begin a new life, also where this process has saved before."""
        self._generation = self._highest = None
        self._life += 1
        self.parent = parent

    def check(self, step: int) -> None:
        """Raise `ValueError` for a step below one that this life has saved."""
        if self._highest is not None and step < self._highest:
            raise ValueError(
                f"step {step}: this life of {self._run} has saved step {self._highest} already, which would stay the "
                "newest. Steps must increase: count them over all epochs (epoch * steps_per_epoch + n); a training "
                f"that goes back to an earlier checkpoint begins a new life there with restore(state, step={step})"
            )

    def target(self, step: int, metadata: Mapping[str, Any], metrics: Mapping[str, float | None]) -> Target:
        """Return where a step of this life is saved."""
        return Target(
            storage=self._tiers.places.first,
            directory=step_directory(step),
            step=step,
            parent=self.parent,
            generation=self._generation,
            owner=_Owner(self, self._life, self.parent, self._tiers, self._hooks),
            metadata=metadata,
            metrics=metrics,
            site=self._tiers.site,
            rendezvous=self._tiers.rendezvous,
        )

    @contextmanager
    def saving(self, step: int, saver: Saver) -> Iterator[None]:
        """Note that a step is saved: what comes of it is known at the end of the block."""
        before, self._highest = self._highest, step
        try:
            yield
        except StateError:
            if not self.started:  # refused on all ranks before anything was written: no step was saved yet
                self._highest = before
            raise
        finally:
            # Also where this rank's snapshot failed: whether the next save claims one is the same on all ranks.
            self._generation = saver.generation
        self.started = True

    def claim(self, life: int, parent: tuple[int, int] | None) -> int:
        """Claim a life's generation, on rank 0, once: also where the ranks have to agree on it again.

        A call that a storage has held for longer than the timeout may come to its end later. The next one waits for
        that, and takes what it has claimed: a second claim beside it could be the lower one.
        """
        with self._claiming:
            if life not in self._claimed:
                self._claimed[life] = self._tiers.claims.claim(parent)
            return self._claimed[life]


@dataclass(frozen=True, slots=True)
class _Owner:
    """The run as one life's saves meet it."""

    line: Line
    life: int
    parent: tuple[int, int] | None
    tiers: Tiers
    hooks: CommitHooks

    def claim(self) -> int:
        """Claim this life's generation."""
        return self.line.claim(self.life, self.parent)

    def told(self, done: Committed, stats: SaveStats) -> None:
        """Have the user's hooks called."""
        if done.manifest is not None:
            self.hooks.saved(done.manifest, stats, persistent=self.tiers.places.local is None)

    def committed(self, done: Committed) -> None:
        """Have the checkpoint uploaded, and delete what it replaces."""
        self.tiers.committed(done)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the run stands: called, it returns the newest committed step that this rank knows of; any thread may."""

    saves: Saves
    line: Line
    opening: Opening

    def __call__(self) -> int | None:
        """Return the step, None where there is no checkpoint."""
        newest = self.saves.newest()
        if newest is not None:
            return newest
        return self.opening.found if self.line.parent is None else self.line.parent[1]
