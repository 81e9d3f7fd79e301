"""The life of a save: state, plan, snapshot; then, in the background, archive, receipt, commit."""

from __future__ import annotations

import functools
import gc
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from ckptengine.catalog.manifest import checked_metadata
from ckptengine.catalog.receipt import patience
from ckptengine.comm.agree import gather
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError, SaveFailedError
from ckptengine.frameworks.registry import adapters
from ckptengine.lifecycle import Living
from ckptengine.save.archive import MemoryArchive, StorageArchive
from ckptengine.save.aside import Aside
from ckptengine.save.cleaner import Cleaner
from ckptengine.save.committer import Committer
from ckptengine.save.handle import Phase, SaveHandle
from ckptengine.save.job import Job, Target
from ckptengine.save.planner import Plan, Planner
from ckptengine.save.reading import Reading, StateReader
from ckptengine.save.replicas import ReplicaCheck, replica_crcs, with_aliases
from ckptengine.save.turn import Turns
from ckptengine.save.values import StoredValues, stored_values
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, Placement
from ckptengine.schema.path import Path, dotted
from ckptengine.snapshot.feed import Feed
from ckptengine.snapshot.pack import Checksums, CopyTable
from ckptengine.snapshot.shared_arena import SharedArena
from ckptengine.snapshot.snapshotter import Images, Snapshotter
from ckptengine.state.held import held_arrays
from ckptengine.storage.stuck import operation_of
from ckptengine.storage.within import within

__all__ = ["DEFAULT_TIMEOUT", "Saver"]

DEFAULT_TIMEOUT = 600.0
"""Seconds after which a wait for other ranks or for the storage is an error; torch's own default is 600 to 1,800."""

_LEAF_NBYTES = 1536
"""About what an archive has of a leaf beside its bytes: headers, metadata, directory."""

_log = logging.getLogger("ckptengine")


class MemoryPlace(Images, Protocol):
    """Where snapshots are committed in shared memory before they are durable."""

    def target(self, job: Job) -> Target:
        """Return where a save is committed in memory; called when its snapshot is complete, before that commit."""

    def kept(self, arena: SharedArena | None) -> None:
        """Note that the image in an arena is committed in memory."""


class Saver:
    """Saves one job's states, one at a time, through one arena. Lives as long as the job.

    Several threads may save: one after the other, in an order that all ranks must share. A forked process gets an
    arena of its own, since the memory of its parent's is shared with it. With `memory`, every snapshot is also
    committed there.
    """

    def __init__(
        self,
        comm: Communicator,
        timeout: float = DEFAULT_TIMEOUT,
        *,
        overlap: bool = False,
        arena_nbytes: int | None = None,
        memory: MemoryPlace | None = None,
    ) -> None:
        self._comm = comm
        self._memory = memory
        self._timeout = self.timeout = timeout
        self._overlap, self._arena_nbytes = overlap, arena_nbytes
        self._planner = Planner(comm)
        self._reader = StateReader()
        self._table: CopyTable | None = None
        self._make_workers()
        self._prepared = False
        self._told_empty: set[Path] = set()
        self._unhook: list[Callable[[], None]] = []
        self._job: Job | None = None
        self._copier: threading.Thread | None = None
        self._turns = Turns("a save")
        self._cleaner = Cleaner()
        self._usable = True
        self.generation: int | None = None
        """The generation of the last save that was started; None where it could not be claimed."""
        _living.add(self)

    def _make_workers(self) -> None:
        comm, together = self._comm, self._planner.together_next
        self._snapshotter = Snapshotter(self._arena_nbytes, self._memory)
        self._committer = Committer(comm, StorageArchive(comm.rank, self._snapshotter), together)
        # What it makes of the plans is for itself: the other committer tells the planner.
        self._keeper = Committer(comm, MemoryArchive(comm.rank), lambda: None, "-memory")
        self._keeping: Aside[None] | None = None
        self._not_kept = ""

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._job is not None and not self._job.handle.durable.done()

    def wait(self, timeout: float, directory: str = "") -> None:
        """Wait until the save in flight has ended, well or not, and this rank knows how, on all ranks the same.

        Nobody waits for it longer than it may take itself. `directory` is where the next one goes. Raises
        `DeadlineError` where it doesn't end in time, and what `Committer.settle` does.
        """
        called = time.monotonic()
        try:
            self._wait(timeout)
            self._committer.settle(max(0.0, called + timeout - time.monotonic()), directory)
        except CheckpointError:
            # The others may have gone on to an attempt that now fails; then all meet in the next exchange.
            self._planner.together_next()
            raise

    def _wait(self, timeout: float) -> None:
        if self._job is not None and not self._job.handle.durable.wait(min(timeout, self._job.handle.durable.left)):
            doing = operation_of(self._job.thread)
            raise DeadlineError(
                f"{self._job.handle.path} is still being saved after {time.monotonic() - self._job.started:.3g} s"
                f"{f': {doing} has not ended' if doing else ''}"
            )

    def settle(self, timeout: float) -> None:
        """Wait for the save in flight and for the cleaning up after it; raises `DeadlineError`.

        Where this rank knows that the save is committed, and only the others can't be met about it, that is logged: the
        next save, if there is one, meets them.
        """
        self._wait(timeout)
        try:
            self.wait(timeout)
        except CheckpointError as problem:
            if not self._committer.certain:
                raise
            _log.warning("%s; this rank knows that the save is committed", problem)
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join(timeout)
        if not self._cleaner.settle(timeout):
            doing = self._cleaner.doing or "it"
            raise DeadlineError(f"cleaning up after a save did not end within {timeout:g} s: {doing} takes so long")
        self._settle_memory(timeout)

    def _settle_memory(self, timeout: float) -> None:
        """Wait for the commit in memory, which says which arena is free."""
        if self._keeping is not None and not self._keeping.settle(timeout):
            raise DeadlineError(f"keeping a checkpoint in memory did not end within {timeout:g} s")

    def close(self) -> None:
        """Wait for the save in flight and give the memory back."""
        self.settle(self._timeout)
        with self._turns.take(self._timeout):
            self._snapshotter.close()
        while self._unhook:
            self._unhook.pop()()
        self.report()
        _living.discard(self)

    def report(self) -> None:
        """Log the failure of the last save where nobody has asked for its result: no failure stays silent."""
        durable = None if self._job is None else self._job.handle.durable
        if durable is not None and durable.done() and durable.error is not None and not durable.observed:
            assert self._job is not None
            durable.observed = True
            _log.error("%s was NOT saved: %s", self._job.handle.path, durable.error)

    def after_fork(self) -> None:
        """Cut what a forked process shares with its parent: the arena, the save in flight, the series of attempts."""
        self._turns, self._cleaner, self._copier = Turns("a save"), Cleaner(), None
        self._usable = self._comm.world_size == 1
        if self._job is not None:
            self._job.handle.staged.abandon(RankFailedError("this save belongs to the parent process"))
            self._job.handle.durable.abandon(RankFailedError("this save belongs to the parent process"))
            self._job.handle.durable.observed = True
            self._job = None
        self._snapshotter.abandon()
        self._reader, self._table, self._memory = StateReader(), None, None
        self._make_workers()
        self._planner.together_next()

    def start(
        self,
        target: Target,
        state: Mapping[str, Any],
        check: ReplicaCheck = ReplicaCheck.FIRST,
        timeout: float | None = None,
    ) -> SaveHandle:
        """Take the snapshot of a state and start its way to the storage; all ranks call it together.

        The first call, and one that follows a change of the state's structure, exchanges plans between the
        ranks; no other does. Returns when training may go on.

        Raises `StateError`, `ReplicaMismatchError`, `StorageError`, `DeadlineError`.
        """
        timeout = self._timeout if timeout is None else timeout
        with self._turns.take(timeout):
            return self._start(target, state, check, timeout)

    def _start(self, target: Target, state: Mapping[str, Any], check: ReplicaCheck, timeout: float) -> SaveHandle:
        if not self._usable:
            raise CheckpointError(
                f"this process was forked from rank {self._comm.rank}: only the rank itself can save with the others"
            )
        called = time.monotonic()
        self.wait(timeout, target.directory)
        if not self._planner.together and self._committer.left_out(self._planner.coming_attempt, target.directory):
            self._planner.together_next()
        self._settle_memory(timeout)
        if self._copier is not None:
            self._copier.join(timeout)  # of a save that was interrupted: it still copies into the arena
        self.report()
        behind = self._cleaner.wait_for_room(timeout / 2)
        started = time.monotonic()
        table, self._table = self._table, None  # good again when it has been told what has moved
        reading: Reading | None = None
        values: StoredValues | None = None
        error: Exception | None = None
        interrupt: BaseException | None = None
        try:
            with _collection_later():
                reading = self._reader.read(state)
                values = stored_values(reading.plain)
            self._tell_empty(reading.plain.empty)
            checked_metadata(target.metadata)
            if behind:
                raise SaveFailedError(
                    f"{target.storage.location()}: what earlier saves have made superfluous is deleted more slowly "
                    f"than saves come: {behind} takes more than {timeout / 2:g} s"
                )
        except Exception as problem:
            error = problem
        except BaseException as problem:
            # The other ranks hear of it before it goes its way: they would wait for this one.
            interrupt, error = problem, _interrupted(problem)
        read = time.monotonic()
        # Which save this is: a rank that has left one out is in step again at its next one.
        self._comm.about = target.location
        try:
            generation = self._open(target, reading, timeout)
            with _collection_later():
                plan, error = self._planner.plan(reading, values, error, timeout, check)
        except BaseException as problem:
            if not isinstance(problem, Exception):
                self._planner.together_next()  # whether the ranks have met is not known
            if interrupt is not None:
                raise interrupt from problem
            raise
        finally:
            self._comm.about = ""
        job = Job(
            target=target,
            generation=generation,
            attempt=self._planner.next_attempt(),
            handle=SaveHandle(target.location, timeout, patience(self._comm.rank)),
            deadline=started + timeout,
            started=started,
            waited=started - called,
            feed=Feed(started + timeout),
            plan=plan,
            values=values,
            error=error,
        )
        job.phases.append(Phase("read", 0.0, read - started))
        job.phase("plan", read)
        try:
            # The background makes its directory and reserves its file while this thread copies.
            self._launch(job)
            if self._memory is not None:
                self._keeping = Aside(functools.partial(self._keep, self._memory, job))
            if interrupt is not None:
                raise interrupt
            if error is not None:
                raise error
            assert reading is not None
            assert plan is not None
            self._snapshot(job, plan, reading, table, check, timeout)
        except BaseException as problem:
            self._give_up(job, problem)
            if isinstance(problem, CheckpointError) or not isinstance(problem, Exception):
                raise
            raise SaveFailedError(f"{job.handle.path} was not saved: {type(problem).__name__}: {problem}") from problem
        return job.handle

    def _launch(self, job: Job) -> None:
        """Send a save on its way through the background."""
        self._job = job
        job.thread = threading.Thread(target=self._finish, args=(job,), name="ckptengine-save", daemon=True)
        job.handle.work_in(job.thread)
        try:
            job.thread.start()
        except Exception as problem:
            raise SaveFailedError(f"{job.handle.path} was not saved, its thread did not start: {problem}") from problem

    def _give_up(self, job: Job, problem: BaseException) -> None:
        """End a save that can't be, or was interrupted, in this process and, by its receipt, on the other ranks."""
        failure = problem if isinstance(problem, Exception) else _interrupted(problem)
        job.feed.finish(failure)
        job.handle.durable.observed = True
        if job.thread is None or job.thread.ident is None:
            # No thread will end this save: end it here, or every later one would wait for it.
            self._planner.together_next()
            job.handle.staged.reach(error=failure)
            job.handle.durable.reach(error=failure)

    def _snapshot(
        self,
        job: Job,
        plan: Plan,
        reading: Reading,
        table: CopyTable | None,
        check: ReplicaCheck,
        timeout: float,
    ) -> None:
        """Copy the state, or have it copied until the optimizer's next step."""
        if table is None or table.image is not plan.image or reading.moved is None:
            with _collection_later():
                numbers = {leaf.path: number for number, leaf in enumerate(reading.leaves)}
                order = [numbers[item.path] for item in plan.assigned]
                table = CopyTable(plan.image, reading.leaves, order, self._overlap)
        else:
            table.move(reading.moved)
        job.checksums = Checksums(plan.image)
        whole = self._snapshotter.reserve(plan.image, timeout)
        job.arena = self._snapshotter.shared
        # A plan that was made alone has not been compared; the coordinator does it with the receipts.
        wanted = check is ReplicaCheck.ALWAYS or (plan.alone and check is ReplicaCheck.FIRST)
        if wanted and not self._planner.compared and self._comm.world_size > 1:
            job.replica_crcs = with_aliases(replica_crcs(reading.leaves), reading.plain.aliases)
        began = time.monotonic()
        if whole:
            self._snapshotter.fill(table, job.checksums, job.feed)
        else:
            self._snapshotter.stream(table, job.checksums, job.feed)
        self._table = table
        if whole and table.has_fenced:
            self._hook()
            rest = (job, table, reading, reading.versions())
            self._copier = threading.Thread(target=self._copy_fenced, args=rest, name="ckptengine-copy", daemon=True)
            job.stall = time.monotonic() - job.started
            self._copier.start()
        else:
            table.release()
            job.phase("copy", began)
            job.stall = time.monotonic() - job.started
            job.handle.staged.reach()
            job.feed.finish()

    def _copy_fenced(self, job: Job, table: CopyTable, reading: Reading, before: list[Any]) -> None:
        """Copy what only an optimizer's step changes, while forward and backward run; the step waits for it."""
        began = time.monotonic()
        error: Exception | None
        try:
            assert job.checksums is not None
            self._snapshotter.fill_fenced(table, job.checksums, job.feed)
            changed = [
                path for path, old, new in zip(reading.fenced, before, reading.versions(), strict=True) if old != new
            ]
            if changed:
                raise SaveFailedError(
                    f"{dotted(changed[0])}: changed by something other than an optimizer's step while it was being "
                    f"copied ({len(changed)} leaves were): call fence() before such a change, or save without overlap"
                )
            error = None
        except Exception as problem:
            error = problem
        table.release()
        job.phase("copy", began)
        job.handle.staged.reach(error=error)
        job.feed.finish(error)

    def fence(self, timeout: float | None = None) -> None:
        """Wait until the snapshot under way is complete: from then on the state's tensors may be changed.

        Raises `DeadlineError` where it isn't in time.
        """
        job, timeout = self._job, self._timeout if timeout is None else timeout
        if job is not None and not job.handle.staged.done() and not job.handle.staged.wait(timeout):
            raise DeadlineError(f"the snapshot for {job.handle.path} was not complete after {timeout:g} s")

    def _hook(self) -> None:
        """Have every optimizer of every framework wait for the snapshot before it steps."""
        if self._unhook:
            return
        saver = weakref.ref(self)

        def wait() -> None:
            living = saver()
            if living is not None:
                living.fence()

        self._unhook = [adapter.before_optimizer_step(wait) for adapter in adapters()]

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Reserve memory for snapshots of a state in the background, once: the first save then finds it there."""
        if self._prepared or self._job is not None:
            return
        self._prepared = True
        self._snapshotter.prepare(sum(self._share(leaf) + _LEAF_NBYTES for leaf in held_arrays(state)))

    def _share(self, leaf: ArrayLeaf) -> int:
        """Return about how many bytes of a leaf this rank will write."""
        held = sum(part.box.volume for part in leaf.parts) * DTYPES[leaf.dtype].itemsize
        if leaf.placement is Placement.REPLICATED:
            return held // self._comm.world_size
        return held if leaf.placement is not Placement.WHOLE or self._comm.rank == 0 else 0

    def _tell_empty(self, empty: Mapping[Path, str]) -> None:
        """Log once what has nothing to save: who put it into the state may have expected otherwise."""
        new = {path: kind for path, kind in empty.items() if path not in self._told_empty}
        self._told_empty.update(new)
        if new and self._comm.rank == 0:
            names = ", ".join(f"{dotted(path)} ({kind})" for path, kind in list(new.items())[:8])
            more = f" and {len(new) - 8} more" if len(new) > 8 else ""
            _log.warning("nothing of %s%s is saved: its state_dict() is empty", names, more)

    def _open(self, target: Target, reading: Reading | None, timeout: float) -> int:
        """Return the generation to write under; where rank 0 has yet to claim it, all ranks exchange a word.

        That exchange also tells whether any rank's structure changed, or it has to plan with the others, as after a
        failure of which not all know: then all plan together. They exchange it too where they plan together anyway.
        """
        self.generation = target.generation
        if target.generation is not None and not self._planner.together:
            return target.generation
        word: dict[str, Any] = {"together": self._planner.together or self._planner.changed(reading)}
        error = None
        if self._comm.rank == 0:
            try:
                assert target.claim is not None
                doing = f"opening {target.location}"
                claimed = target.generation
                word["generation"] = within(timeout, doing, target.claim) if claimed is None else claimed
            except Exception as problem:
                error = problem
        replies = gather(self._comm, json.dumps(word).encode(), error, timeout, f"opening {target.location}")
        words = [json.loads(reply) for reply in replies]
        if any(word["together"] for word in words):
            self._planner.together_next()
        self.generation = int(words[0]["generation"])
        return self.generation

    def _finish(self, job: Job) -> None:
        """Bring a snapshot through the background part of a save, and tell the handle how it ended."""
        stats = None
        try:
            stats = self._committer.commit(job)
        except BaseException as problem:  # whatever it is: nobody may wait for a save that has no thread any more
            # Every rank comes here where the attempt failed on any, so all plan together at the next save. One that
            # has not heard how it ended asks first: it may have failed on no other.
            job.error = job.error or (problem if isinstance(problem, Exception) else _interrupted(problem))
            if not self._committer.in_doubt:
                self._planner.together_next()
        if job.target.told is not None and stats is not None and self._comm.rank == 0:
            job.target.told(job.attempt, stats)
        job.handle.staged.reach(error=job.error)
        job.handle.durable.reach(stats, job.error)
        job.held.close()
        committed = job.target.committed
        if job.error is None and committed is not None and (self._comm.rank == 0 or job.target.leads):
            self._cleaner.offer(functools.partial(committed, job.generation, job.attempt), job.handle.path)

    def _keep(self, memory: MemoryPlace, job: Job) -> None:
        """Commit a snapshot where it lies, in shared memory, while it is on its way to the storage.

        Where that fails, on any rank, this checkpoint is not there, and nothing else is lost.
        """
        error: BaseException | None = None
        try:
            job.feed.wait_finished()  # whatever the storage does: memory is all there is where that fails
        except BaseException as problem:
            error = problem
        kept = replace(
            job,
            target=memory.target(job),
            error=error if error is None or isinstance(error, Exception) else _interrupted(error),
            feed=Feed(job.deadline),
            held=ExitStack(),
            phases=[],
            thread=None,
        )
        try:
            self._keeper.commit(kept)
            memory.kept(kept.arena)
            if kept.target.committed is not None and (self._comm.rank == 0 or kept.target.leads):
                kept.target.committed(kept.generation, kept.attempt)
        except Exception as problem:
            # Rank 0 hears of every rank's trouble, and the save's own failure is told elsewhere.
            if self._comm.rank == 0 and error is None and str(problem) != self._not_kept:
                self._not_kept = str(problem)  # the same trouble at every save is told once
                _log.warning("%s is not kept in memory: %s", job.handle.path, problem)
        finally:
            kept.held.close()


def _interrupted(problem: BaseException) -> SaveFailedError:
    """Return what is said of a save that something which is no error has ended, such as Ctrl-C."""
    return SaveFailedError(f"it was interrupted by {type(problem).__name__}{f': {problem}' if str(problem) else ''}")


@contextmanager
def _collection_later() -> Iterator[None]:
    """Keep the garbage collector out of work that makes many objects and no cycles.

    It would look at every object of the job several times, which takes longer than the work (100,000 leaves: 7 instead
    of 1.5 microseconds for each).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _ended(saver: Saver) -> None:
    """Wait for saves in flight when the interpreter ends: a checkpoint that was asked for is not dropped silently."""
    try:
        saver.settle(saver.timeout)
    except DeadlineError as error:
        _log.error("%s", error)
    saver.report()


_living: Living[Saver] = Living(forked=Saver.after_fork, ended=_ended)
