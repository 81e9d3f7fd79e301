"""The copy of a state into the snapshot's memory: at once, or until the optimizer's next step."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import CheckpointError, DeadlineError, DeviceError, SaveFailedError
from ckptengine.frameworks.registry import adapters
from ckptengine.save.attempt import Attempt, ReplicaCrcs, Snapshot, Tail, Work
from ckptengine.save.collection import collection_later
from ckptengine.save.handle import SaveHandle
from ckptengine.save.reading import Reading
from ckptengine.save.replicas import replica_crcs, with_aliases
from ckptengine.schema.path import dotted
from ckptengine.snapshot.pack import Checksums, CopyTable
from ckptengine.snapshot.shared_arena import SharedArena
from ckptengine.snapshot.snapshotter import Images, Snapshotter, on_same_devices

__all__ = ["Copier"]


class Copier:
    """Copies one saver's states, one at a time, and hands each attempt's feed its windows and its `Snapshot`.

    `arena_nbytes` bounds the memory, None: as large as the image; with `images`, it lies in one of those.
    """

    def __init__(
        self, rank: int, timeout: float, overlap: bool, arena_nbytes: int | None, images: Images | None
    ) -> None:
        self._rank, self._timeout, self._overlap, self._arena_nbytes = rank, timeout, overlap, arena_nbytes
        self.snapshotter = Snapshotter(arena_nbytes, images)
        self._prepared = False
        self._table: CopyTable | None = None
        self._thread: threading.Thread | None = None
        self._handle: SaveHandle | None = None
        self._unhook: list[Callable[[], None]] = []

    def prepare(self, needed: Callable[[], tuple[int, bool]]) -> None:
        """Reserve memory for snapshots in the background, once: only then it is asked of how many bytes they are about,
        and whether any come from devices."""
        if not self._prepared:
            self._prepared = True
            self.snapshotter.prepare(*needed())

    def take_table(self) -> CopyTable | None:
        """Return the last copy's table, for `copy`: it is good again when it has been told what has moved since."""
        table, self._table = self._table, None
        return table

    def settle(self, timeout: float) -> bool:
        """Wait for the copy of a save that has failed: it still copies into the arena. Return whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def expect(self, handle: SaveHandle) -> None:
        """Have `fence` wait for this save's snapshot from now on."""
        self._handle = handle

    def copy(
        self, attempt: Attempt, work: Work, reading: Reading, table: CopyTable | None, compare: bool, timeout: float
    ) -> None:
        """Copy the state, or have it copied until the optimizer's next step; with `compare`, with its replicas' CRCs.

        Raises `StorageError` where there is no memory for it, and what the copy raises.
        """
        image = work.plan.image
        if table is None or table.image is not image or reading.moved is None:
            with collection_later():
                numbers = {leaf.path: number for number, leaf in enumerate(reading.leaves)}
                order = [numbers[item.path] for item in work.plan.assigned]
                table = CopyTable(image, reading.leaves, order, self._overlap)
        else:
            table.move(reading.moved, reading.held)
        checksums = Checksums(image)
        whole = self.snapshotter.reserve(image, timeout)
        arena = self.snapshotter.shared
        crcs: ReplicaCrcs = ()
        if compare:
            crcs = with_aliases(replica_crcs(reading.leaves, work.plan.copies), reading.plain.aliases)
        begun = _UnderWay(attempt, table, checksums, Tail(work, checksums, self._rank), arena, crcs)
        began = time.monotonic()
        try:
            if whole:
                self.snapshotter.fill(table, checksums, attempt.left_for_devices)
            else:
                self.snapshotter.stream(table, checksums, attempt.feed, attempt.left_for_devices)
        except DeviceError as problem:
            raise self._told(attempt, problem) from problem
        self._table = table
        stall = time.monotonic() - attempt.started
        if whole and table.has_fenced:
            self._hook()
            self._go_on(self._copy_fenced, begun, reading, reading.versions(), stall)
        elif whole and table.has_devices:
            snapshot = begun.copied(began, stall)
            attempt.handle.staged.reach(None)
            self._go_on(self._complete, begun, snapshot)
        else:
            if whole:
                self.snapshotter.complete(table, checksums, attempt.feed)
            table.release()
            snapshot = begun.copied(began, time.monotonic() - attempt.started)
            attempt.handle.staged.reach(None)
            attempt.feed.finish(snapshot)

    def _go_on(self, call: Callable[..., None], *arguments: Any) -> None:
        """Do the rest of a copy beside the training."""
        there = on_same_devices(functools.partial(call, *arguments))
        self._thread = threading.Thread(target=there, name="ckptengine-copy", daemon=True)
        self._thread.start()

    def _copy_fenced(self, rest: _UnderWay, reading: Reading, before: Sequence[Any], stall: float) -> None:
        """Copy what only an optimizer's step changes, while forward and backward run; the step waits for it."""
        attempt, began = rest.attempt, time.monotonic()
        try:
            self.snapshotter.bring(rest.table, rest.checksums, attempt.left_for_devices)
            changed = [
                path for path, old, new in zip(reading.fenced, before, reading.versions(), strict=True) if old != new
            ]
            if changed:
                raise SaveFailedError(
                    f"{dotted(changed[0])}: changed by something other than an optimizer's step while it was being "
                    f"copied ({len(changed)} leaves were): call fence() before such a change, or save without overlap"
                )
            snapshot = rest.copied(began, stall)
        except Exception as problem:
            error = self._told(attempt, problem)
            rest.table.release()
            attempt.handle.staged.fail(error)
            attempt.feed.fail(error)
            return
        attempt.handle.staged.reach(None)
        self._complete(rest, snapshot)

    def _complete(self, rest: _UnderWay, snapshot: Snapshot) -> None:
        """Checksum what has come from devices: its own pass over the host's memory, for which no step waits."""
        feed = rest.attempt.feed
        try:
            rest.table.release()
            self.snapshotter.complete(rest.table, rest.checksums, feed)
        except Exception as problem:
            feed.fail(self._told(rest.attempt, problem))
        else:
            feed.finish(snapshot)

    def _told(self, attempt: Attempt, problem: Exception) -> Exception:
        """Return what a copy has raised as an error that names the save."""
        if isinstance(problem, DeviceError):
            what = f"rank {self._rank}: {problem}. Earlier checkpoints are unchanged"
        elif isinstance(problem, CheckpointError):
            return problem
        else:
            what = f"{type(problem).__name__}: {problem}"
        failure = SaveFailedError(f"{attempt.handle.path} was not saved: {what}")
        failure.__cause__ = problem
        return failure

    def fence(self, timeout: float | None = None) -> None:
        """Wait until the snapshot under way is complete: from then on the state's tensors may be changed.

        Raises `DeadlineError` where it isn't in time.
        """
        handle, timeout = self._handle, self._timeout if timeout is None else timeout
        if handle is not None and not handle.staged.done() and not handle.staged.wait(timeout):
            raise DeadlineError(f"the snapshot for {handle.path} was not complete after {timeout:g} s")

    def _hook(self) -> None:
        """Have every optimizer of every framework wait for the snapshot before it steps."""
        if self._unhook:
            return
        copier = weakref.ref(self)

        def wait() -> None:
            living = copier()
            if living is not None:
                living.fence()

        self._unhook = [adapter.before_optimizer_step(wait) for adapter in adapters()]

    def close(self) -> bool:
        """Give the memory back, and forget what was known of it; return whether nothing prepares it any more."""
        self._table = None
        return self.snapshotter.close(self._timeout)

    def unhook(self) -> None:
        """Let optimizers step without asking."""
        while self._unhook:
            self._unhook.pop()()

    def after_fork(self) -> None:
        """Cut what a forked process shares with its parent: the arena, and the copy under way."""
        self.snapshotter.abandon()
        self.snapshotter = Snapshotter(self._arena_nbytes)
        self._table = self._thread = self._handle = None


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A copy that has begun."""

    attempt: Attempt
    table: CopyTable
    checksums: Checksums
    tail: Tail
    arena: SharedArena | None
    replica_crcs: ReplicaCrcs

    def copied(self, began: float, stall: float) -> Snapshot:
        """Return the snapshot, whose last part was begun at a moment and is there now."""
        return Snapshot(self.tail, self.arena, self.replica_crcs, self.attempt.phase("copy", began), stall)
