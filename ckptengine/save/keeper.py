"""Commits in shared memory: each snapshot where it lies, while it is on its way to the storage."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

from ckptengine.comm.base import Communicator
from ckptengine.errors import DeadlineError
from ckptengine.save.archive import MemoryArchive
from ckptengine.save.aside import Aside
from ckptengine.save.attempt import Attempt, Target, interrupted
from ckptengine.save.committer import Committer
from ckptengine.snapshot.shared_arena import SharedArena
from ckptengine.snapshot.snapshotter import Images

__all__ = ["Keeper", "LastingImages", "MemoryPlace"]

_log = logging.getLogger("ckptengine")


class LastingImages(Images, Protocol):
    """Memory for images that outlive the process, which knows what is committed there."""

    def kept(self, arena: SharedArena | None) -> None:
        """Note that the image in an arena is committed in memory."""

    def tidy(self, attempt: str) -> None:
        """Remove what the commit of an attempt has made superfluous, on the first rank that sees the place."""


class MemoryPlace(Protocol):
    """Where snapshots are committed in shared memory before they are durable."""

    @property
    def images(self) -> LastingImages:
        """The memory in which the images lie."""

    def target(self, attempt: Attempt) -> Target:
        """Return where an attempt is committed in memory; called when its snapshot is complete, before that commit."""


class Keeper:
    """Has the snapshots of one saver committed in memory, one at a time, in the background.

    Where that fails, on any rank, this checkpoint is not there, and nothing else is lost.
    """

    def __init__(self, comm: Communicator, memory: MemoryPlace) -> None:
        self._rank, self._memory = comm.rank, memory
        # What it makes of the plans is for itself: the other committer tells the planner.
        self._committer = Committer(comm, MemoryArchive(), lambda: None, "-memory")
        self._keeping: Aside[None] | None = None
        self._not_kept = ""

    def start(self, attempt: Attempt) -> None:
        """Have an attempt committed in memory as soon as its snapshot is complete."""
        self._keeping = Aside(functools.partial(self._keep, attempt))

    def settle(self, timeout: float) -> None:
        """Wait for the commit in memory, which says which arena is free; raises `DeadlineError`."""
        if self._keeping is not None and not self._keeping.settle(timeout):
            raise DeadlineError(f"keeping a checkpoint in memory did not end within {timeout:g} s")

    def _keep(self, attempt: Attempt) -> None:
        arena, failed = None, False
        try:
            arena = attempt.feed.whole().arena  # whatever the storage does: memory is all there is where that fails
        except BaseException as problem:
            attempt, failed = replace(attempt, work=interrupted(problem)), True
        kept = replace(attempt, target=self._memory.target(attempt))
        with ExitStack() as held:
            try:
                self._committer.commit(kept, held)
                self._memory.images.kept(arena)
                if self._rank == 0 or kept.target.leads:
                    self._memory.images.tidy(kept.name)
            except Exception as problem:
                # Rank 0 hears of every rank's trouble, and the save's own failure is told elsewhere.
                if self._rank == 0 and not failed and str(problem) != self._not_kept:
                    self._not_kept = str(problem)  # the same trouble at every save is told once
                    _log.warning("%s is not kept in the memory tier: %s", attempt.handle.path, problem)
