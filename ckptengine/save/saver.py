"""The life of a save: state, plan, snapshot; then, in the background, archive, receipt, commit."""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ckptengine.catalog.manifest import checked_metadata
from ckptengine.catalog.receipt import patience
from ckptengine.comm.agree import gather
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError, SaveFailedError
from ckptengine.lifecycle import Living
from ckptengine.save.archive import StorageArchive
from ckptengine.save.attempt import Attempt, Target, Work, interrupted, phase_of
from ckptengine.save.cleaner import Cleaner
from ckptengine.save.collection import collection_later
from ckptengine.save.committer import Committer
from ckptengine.save.copier import Copier
from ckptengine.save.handle import Phase, SaveHandle
from ckptengine.save.keeper import Keeper, MemoryPlace
from ckptengine.save.planner import Planner, Taken
from ckptengine.save.reading import Reading, StateReader
from ckptengine.save.replicas import ReplicaCheck
from ckptengine.save.turn import Turns
from ckptengine.save.values import stored_values
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, DeviceMemory, Placement
from ckptengine.snapshot.feed import Feed
from ckptengine.state.held import held_arrays
from ckptengine.storage.stuck import operation_of
from ckptengine.storage.within import within

__all__ = ["DEFAULT_TIMEOUT", "Saver"]

DEFAULT_TIMEOUT = 600.0
"""Seconds after which a wait for other ranks or for the storage is an error; torch's own default is 600 to 1,800."""

_LEAF_NBYTES = 1536
"""About what an archive has of a leaf beside its bytes: headers, metadata, directory."""

_WORD_SECONDS = 10.0
"""How long a call of a save that has failed waits at most until the other ranks have been told."""

_log = logging.getLogger("ckptengine")


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
        self._comm, self.timeout = comm, timeout
        self._planner = Planner(comm)
        self._reader = StateReader()
        self._copier = Copier(comm.rank, timeout, overlap, arena_nbytes, None if memory is None else memory.images)
        self._committer = self._new_committer()
        self._keeper = None if memory is None else Keeper(comm, memory)
        self._cleaner = Cleaner()
        self._turns = Turns("a save")
        self._flight: _Flight | None = None
        self._usable = True
        self.generation: int | None = None
        """The generation of the last save that was started; None where it could not be claimed."""
        _living.add(self)

    def _new_committer(self) -> Committer:
        return Committer(self._comm, StorageArchive(self._copier.snapshotter), self._planner.together_next)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._flight is not None and not self._flight.attempt.handle.durable.done()

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
        flight = self._flight
        if flight is None:
            return
        attempt, durable = flight.attempt, flight.attempt.handle.durable
        if not durable.wait(min(timeout, durable.left)):
            doing = operation_of(flight.thread)
            raise DeadlineError(
                f"{attempt.handle.path} is still being saved after {time.monotonic() - attempt.started:.3g} s"
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
            _log.warning("%s; this rank knows that the save was committed", problem)
        if self._flight is not None and self._flight.thread.ident is not None:
            self._flight.thread.join(timeout)
        if not self._cleaner.settle(timeout):
            doing = self._cleaner.doing or "it"
            raise DeadlineError(f"cleaning up after a save did not end within {timeout:g} s: waiting for {doing}")
        if self._keeper is not None:
            self._keeper.settle(timeout)

    def close(self) -> bool:
        """Wait for the save in flight and give the memory back; return whether nothing prepares or pins it any more.

        Raises what `settle` raises, and `DeadlineError` where an earlier save's copy has not ended.
        """
        self.settle(self.timeout)
        with self._turns.take(self.timeout):
            if not self._copier.settle(self.timeout):
                raise DeadlineError(_still_copied(self.timeout))
            idle = self._copier.close()
        self._copier.unhook()
        self.report()
        _living.discard(self)
        return idle

    def report(self) -> None:
        """Log the failure of the last save where nobody has asked for its result: no failure stays silent."""
        if self._flight is None:
            return
        path, durable = self._flight.attempt.handle.path, self._flight.attempt.handle.durable
        if durable.done() and durable.error is not None and not durable.observed:
            durable.observed = True
            _log.error("%s was NOT saved: %s", path, durable.error)

    def after_fork(self) -> None:
        """Cut what a forked process shares with its parent: the arena, the save in flight, the series of attempts."""
        self._turns, self._cleaner = Turns("a save"), Cleaner()
        self._usable = self._comm.world_size == 1
        if self._flight is not None:
            handle, self._flight = self._flight.attempt.handle, None
            handle.staged.abandon(RankFailedError("this save belongs to the parent process"))
            handle.durable.abandon(RankFailedError("this save belongs to the parent process"))
            handle.durable.observed = True
        self._copier.after_fork()
        self._reader.forget()
        self._committer, self._keeper = self._new_committer(), None
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
        timeout = self.timeout if timeout is None else timeout
        with self._turns.take(timeout):
            return self._start(target, state, check, timeout)

    def _start(self, target: Target, state: Mapping[str, Any], check: ReplicaCheck, timeout: float) -> SaveHandle:
        if not self._usable:
            raise CheckpointError(
                f"this process was forked from rank {self._comm.rank}: only the rank itself can save with the others"
            )
        called = time.monotonic()
        behind = self._wait_for_earlier(target, timeout)
        started = time.monotonic()
        table = self._copier.take_table()
        read = self._read(target, state, behind)
        done = time.monotonic()
        generation, ready = self._agree(target, read, check, timeout)
        attempt = Attempt(
            target=target,
            generation=generation,
            name=self._planner.next_attempt(),
            handle=SaveHandle(target.location, timeout, patience(self._comm.rank)),
            deadline=started + timeout,
            started=started,
            waited=started - called,
            work=ready if isinstance(ready, Exception) else ready.work,
            phases=(Phase("read", 0.0, done - started), phase_of("plan", done, started)),
            feed=Feed(started + timeout),
        )
        flight = self._new_flight(attempt)
        try:
            # The background makes its directory and reserves its file while this thread copies.
            self._launch(flight)
            if self._keeper is not None:
                self._keeper.start(attempt)
            if read.interrupt is not None:
                raise read.interrupt
            if isinstance(ready, Exception):
                raise ready
            compare = self._planner.take_comparison(ready.work.plan, check)
            self._copier.copy(attempt, ready.work, ready.reading, table, compare, timeout)
        except BaseException as problem:
            self._give_up(flight, problem)
            if isinstance(problem, CheckpointError) or not isinstance(problem, Exception):
                raise
            path = attempt.handle.path
            raise SaveFailedError(f"{path} was not saved: {type(problem).__name__}: {problem}") from problem
        return attempt.handle

    def _wait_for_earlier(self, target: Target, timeout: float) -> str:
        """Wait until the saves before this one are out of its way; return what of them stays undone too long."""
        self.wait(timeout, target.directory)
        if not self._planner.together and self._committer.left_out(self._planner.coming_attempt, target.directory):
            self._planner.together_next()
        if self._keeper is not None:
            self._keeper.settle(timeout)
        copied = self._copier.settle(timeout)
        self.report()
        if not copied:
            return _still_copied(timeout)
        behind = self._cleaner.wait_for_room(timeout / 2)
        if not behind:
            return ""
        return (
            "old checkpoints are deleted more slowly than new ones are saved: "
            f"{behind} takes more than {timeout / 2:g} s"
        )

    def _agree(
        self, target: Target, read: _Read, check: ReplicaCheck, timeout: float
    ) -> tuple[int, _Ready | Exception]:
        """Return the generation to write under, and what is to be written; ranks meet where they have to."""
        # Which save this is: a rank that has left one out is in step again at its next one.
        self._comm.about = target.location
        try:
            generation = self._open(target, read.reading, timeout)
            with collection_later():
                planned = self._planner.plan(read.taken, timeout, check)
        except BaseException as problem:
            if not isinstance(problem, Exception):
                self._planner.together_next()  # whether the ranks have met is not known
            if read.interrupt is not None:
                raise read.interrupt from problem
            raise
        finally:
            self._comm.about = ""
        if isinstance(planned, Exception):
            return generation, planned
        return generation, _Ready(planned.taken.reading, Work(planned.plan, planned.taken.values))

    def _read(self, target: Target, state: Mapping[str, Any], behind: str) -> _Read:
        """Read a state; `behind` is what of earlier saves stays undone too long."""
        reading: Reading | None = None
        try:
            with collection_later():
                reading = self._reader.read(state)
                values = stored_values(reading.plain)
            self._reader.tell_empty(reading, self._comm.rank)
            if target.step is not None and self._comm.rank == 0:
                self._reader.tell_beside(state, reading)
            checked_metadata(target.metadata)
            if behind:
                raise SaveFailedError(f"{target.storage.location()}: {behind}")
        except Exception as problem:
            return _Read(problem, reading)
        except BaseException as problem:
            return _Read(interrupted(problem), reading, problem)
        return _Read(Taken(reading, values), reading)

    def _new_flight(self, attempt: Attempt) -> _Flight:
        told = threading.Event()
        thread = threading.Thread(target=self._finish, args=(attempt, told), name="ckptengine-save", daemon=True)
        return _Flight(attempt, thread, told)

    def _launch(self, flight: _Flight) -> None:
        """Send a save on its way through the background."""
        self._flight, handle = flight, flight.attempt.handle
        self._copier.expect(handle)
        handle.work_in(flight.thread)
        try:
            flight.thread.start()
        except Exception as problem:
            raise SaveFailedError(
                f"{handle.path} was not saved, because its thread did not start: {problem}"
            ) from problem

    def _give_up(self, flight: _Flight, problem: BaseException) -> None:
        """End a save that can't be, or was interrupted, in this process and, by its receipt, on the other ranks."""
        failure, handle = interrupted(problem), flight.attempt.handle
        flight.attempt.feed.fail(failure)
        handle.durable.observed = True
        if flight.thread.ident is None:
            # No thread will end this save: end it here, or every later one would wait for it.
            self._planner.together_next()
            handle.staged.fail(failure)
            handle.durable.fail(failure)
            return
        # The others may be waiting for this word, and the caller for them, in a call that keeps the interpreter's lock
        # and with it the thread that is to send it. Not for ever: that thread may be in a storage that hangs.
        if self._comm.world_size > 1:
            flight.told.wait(_WORD_SECONDS)

    def fence(self, timeout: float | None = None) -> None:
        """Wait until the snapshot under way is complete: from then on the state's tensors may be changed.

        Raises `DeadlineError` where it isn't in time.
        """
        self._copier.fence(timeout)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Reserve memory for snapshots of a state in the background, once: the first save then finds it there."""
        if self._flight is None:
            self._copier.prepare(lambda: self._needed(held_arrays(state)))

    def _needed(self, leaves: Sequence[ArrayLeaf]) -> tuple[int, bool]:
        """Return about how many bytes this rank will write of leaves, and whether any come from devices."""
        nbytes = sum(self._share(leaf) + _LEAF_NBYTES for leaf in leaves)
        return nbytes, any(isinstance(part.memory, DeviceMemory) for leaf in leaves for part in leaf.parts)

    def _share(self, leaf: ArrayLeaf) -> int:
        """Return about how many bytes of a leaf this rank will write."""
        held = sum(part.box.volume for part in leaf.parts) * DTYPES[leaf.dtype].itemsize
        if leaf.placement is Placement.REPLICATED:
            return held // self._comm.world_size
        return held if leaf.placement is not Placement.WHOLE or self._comm.rank == 0 else 0

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
                doing = f"opening {target.location}"
                claimed = target.generation
                word["generation"] = within(timeout, doing, target.owner.claim) if claimed is None else claimed
            except Exception as problem:
                error = problem
        replies = gather(self._comm, json.dumps(word).encode(), error, timeout, f"opening {target.location}")
        words = [json.loads(reply) for reply in replies]
        if any(word["together"] for word in words):
            self._planner.together_next()
        self.generation = int(words[0]["generation"])
        return self.generation

    def _finish(self, attempt: Attempt, told: threading.Event) -> None:
        """Bring a snapshot through the background part of a save, and tell the handle how it ended."""
        target, handle = attempt.target, attempt.handle
        with ExitStack() as held:
            try:
                done, stats = self._committer.commit(attempt, held, told.set)
            except BaseException as problem:  # whatever it is: nobody may wait for a save that has no thread any more
                # Every rank comes here where the attempt failed on any, so all plan together at the next save. One that
                # has not heard how it ended asks first: it may have failed on no other.
                if not self._committer.in_doubt:
                    self._planner.together_next()
                failure = interrupted(problem)
                handle.staged.fail(failure)
                handle.durable.fail(failure)
                told.set()
                return
            if self._comm.rank == 0:
                target.owner.told(done, stats)
            handle.staged.reach(None)
            handle.durable.reach(stats)
        if self._comm.rank == 0 or target.leads:
            self._cleaner.offer(functools.partial(target.owner.committed, done), handle.path)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A save and the thread that brings it to its end, which sets `told` when no other rank needs its word any more."""

    attempt: Attempt
    thread: threading.Thread
    told: threading.Event


@dataclass(frozen=True, slots=True)
class _Read:
    """A state that was taken apart, or what kept this rank from that, with what was read before.

    `interrupt` goes its way, to the caller, when the other ranks have heard of it: they would wait for this one.
    """

    taken: Taken | Exception
    reading: Reading | None
    interrupt: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Ready:
    """A state that was read, and what of it this rank writes."""

    reading: Reading
    work: Work


def _still_copied(timeout: float) -> str:
    return (
        f"the copy of an earlier save, which has failed, has not ended after {timeout:g} s, and may still write to the "
        "memory that the next one would use: the device does not answer; end this process"
    )


def _ended(saver: Saver) -> None:
    """Wait for saves in flight when the interpreter ends: a checkpoint that was asked for is not dropped silently."""
    try:
        saver.settle(saver.timeout)
    except DeadlineError as error:
        _log.error("%s", error)
    saver.report()


_living: Living[Saver] = Living(forked=Saver.after_fork, ended=_ended)
