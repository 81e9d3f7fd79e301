"""The life of a save: state, plan, snapshot; then, in the background, archive, receipt, commit."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.tail import build_tail
from ckptengine.catalog.commit import attempt_directory, publish
from ckptengine.catalog.lease import Lease
from ckptengine.catalog.listing import Entry, manifest_name, read_manifest
from ckptengine.catalog.manifest import Manifest, checked_metadata
from ckptengine.catalog.receipt import Channel, Outcome, Receipt, StorageStore, collect
from ckptengine.comm.agree import agree
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError, ReplicaMismatchError, SaveFailedError
from ckptengine.save.coordinator import Coordinator
from ckptengine.save.handle import SaveHandle, SaveStats
from ckptengine.save.planner import Plan, Planner, replica_crcs
from ckptengine.save.values import StoredValues, stored_values
from ckptengine.snapshot.arena import Arena
from ckptengine.snapshot.pack import Checksums, snapshot
from ckptengine.state.leaf import Path
from ckptengine.state.tree import FlatState, flatten
from ckptengine.storage.base import Storage, join

__all__ = ["DEFAULT_TIMEOUT", "Saver", "Target"]

DEFAULT_TIMEOUT = 600.0
"""Seconds after which a wait for other ranks or for the storage is an error; torch's own default is 600 to 1,800."""

_TAIL_ROOM = 1 << 20
"""What the arena holds beyond the fixed region from the start, so that the usual tail needs no growing."""

# What keeps its class on all ranks; everything else that fails a save is a `SaveFailedError`.
_KINDS: dict[str, type[CheckpointError]] = {kind.__name__: kind for kind in (DeadlineError, ReplicaMismatchError)}

_DRAIN_SECONDS = 10.0
"""How long rank 0 waits, after a failed attempt, for ranks that are still writing, before it cleans up."""

ReplicaCrcs = tuple[tuple[Path, int], ...]

_log = logging.getLogger("ckptengine")


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
class _Job:
    """One save on its way through the background."""

    target: Target
    generation: int
    attempt: str
    handle: SaveHandle
    deadline: float
    started: float
    waited: float
    plan: Plan | None = None
    values: StoredValues | None = None
    checksums: Checksums | None = None
    replica_crcs: ReplicaCrcs = ()
    stall: float = 0.0
    error: Exception | None = None
    thread: threading.Thread | None = field(default=None, repr=False)


class Saver:
    """Saves one job's states, one at a time, through one arena. Lives as long as the job.

    Several threads may save: one after the other, in an order that all ranks must share. A forked process gets an
    arena of its own, since the memory of its parent's is shared with it.
    """

    def __init__(self, comm: Communicator, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._comm = comm
        self._timeout = timeout
        self._planner = Planner(comm)
        self._coordinator = Coordinator(comm.world_size) if comm.rank == 0 else None
        self._arena = Arena()
        self._reported: Plan | None = None  # whose rows rank 0 has
        self._job: _Job | None = None
        self._lock = threading.Lock()
        self._usable = True
        self.generation: int | None = None
        """The generation of the last save that was started; None where it could not be claimed."""
        _living.add(self)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._job is not None and not self._job.handle.durable.done()

    def wait(self, timeout: float) -> None:
        """Wait for the save in flight to end, well or not; raises `DeadlineError` where it doesn't in time."""
        if self._job is not None and not self._job.handle.durable.wait(timeout):
            raise DeadlineError(f"{self._job.handle.path} is still being saved after {timeout:g} s")

    def settle(self, timeout: float) -> None:
        """Wait for the save in flight and for the cleaning up after it."""
        self.wait(timeout)
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join(timeout)

    def close(self) -> None:
        """Wait for the save in flight and give the memory back."""
        self.settle(self._timeout)
        with self._held(self._timeout):
            self._arena.close()
        self.report()
        _living.discard(self)

    def report(self) -> None:
        """Log the failure of the last save where nobody has asked for its result: no failure stays silent."""
        durable = None if self._job is None else self._job.handle.durable
        if durable is not None and durable.done() and durable.error is not None and not durable.observed:
            assert self._job is not None
            durable.observed = True
            _log.error("%s was NOT saved: %s", self._job.handle.path, durable.error)

    @contextmanager
    def _held(self, timeout: float) -> Iterator[None]:
        if not self._lock.acquire(timeout=timeout):
            raise DeadlineError(f"another thread has been starting a save for {timeout:g} s")
        try:
            yield
        finally:
            self._lock.release()

    def after_fork(self) -> None:
        """Cut what a forked process shares with its parent: the arena, the save in flight, the series of attempts."""
        self._lock = threading.Lock()
        self._usable = self._comm.world_size == 1
        if self._job is not None:
            self._job.handle.staged.abandon(RankFailedError("this save belongs to the parent process"))
            self._job.handle.durable.abandon(RankFailedError("this save belongs to the parent process"))
            self._job.handle.durable.observed = True
            self._job = None
        inherited, self._arena = self._arena, Arena()
        inherited.close()
        self._reported = None
        self._planner.together_next()

    def start(
        self,
        target: Target,
        state: Mapping[str, Any],
        check_replicas: bool = False,
        timeout: float | None = None,
    ) -> SaveHandle:
        """Take the snapshot of a state and start its way to the storage; all ranks call it together.

        The first call, and one that follows a change of the state's structure, exchanges plans between the
        ranks; no other does. Returns when training may go on.

        Raises `StateError`, `ReplicaMismatchError`, `StorageError`, `DeadlineError`.
        """
        timeout = self._timeout if timeout is None else timeout
        with self._held(timeout):
            return self._start(target, state, check_replicas, timeout)

    def _start(self, target: Target, state: Mapping[str, Any], check_replicas: bool, timeout: float) -> SaveHandle:
        if not self._usable:
            raise CheckpointError(
                f"this process was forked from rank {self._comm.rank}: only the rank itself can save with the others"
            )
        called = time.monotonic()
        try:
            self.wait(timeout)
        except DeadlineError:
            # The others may have gone on to an attempt that now fails; then all meet in the next exchange.
            self._planner.together_next()
            raise
        self.report()
        started = time.monotonic()
        flat: FlatState | None = None
        values: StoredValues | None = None
        error: Exception | None = None
        try:
            checked_metadata(target.metadata)
            flat = flatten(state)
            values = stored_values(flat)
        except Exception as problem:
            error = problem
        generation = self._open(target, flat, timeout)
        plan, error = self._planner.plan(flat, values, error, timeout)
        job = _Job(
            target=target,
            generation=generation,
            attempt=self._planner.next_attempt(),
            handle=SaveHandle(target.location, timeout),
            deadline=started + timeout,
            started=started,
            waited=started - called,
            plan=plan,
            values=values,
            error=error,
        )
        if flat is not None and plan is not None:
            try:
                self._fill(job, plan, flat, check_replicas)
            except Exception as problem:
                job.error = problem
        job.stall = time.monotonic() - started
        self._launch(job)
        return job.handle

    def _launch(self, job: _Job) -> None:
        """Send a save on its way through the background; raises what kept this rank from its snapshot."""
        self._job = job
        failed, path = job.error, job.handle.path  # the thread may add an error of its own
        if failed is None:
            job.handle.staged.reach()
        job.thread = threading.Thread(target=self._finish, args=(job,), name="ckptengine-save", daemon=True)
        try:
            job.thread.start()
        except BaseException as problem:
            # No thread will end this save: end it here, or every later one would wait for it.
            job.thread = None
            self._planner.together_next()
            job.handle.staged.reach(error=problem)
            job.handle.durable.reach(error=problem)
            job.handle.durable.observed = True
            raise SaveFailedError(f"{path} was not saved, its thread did not start: {problem}") from problem
        if failed is not None:
            job.handle.durable.observed = True
            if isinstance(failed, CheckpointError):
                raise failed
            raise SaveFailedError(f"{path} was not saved: {type(failed).__name__}: {failed}") from failed

    def _open(self, target: Target, flat: FlatState | None, timeout: float) -> int:
        """Return the generation to write under; where rank 0 has yet to claim it, all ranks exchange a word.

        That exchange also tells whether any rank's structure changed: then all plan together.
        """
        self.generation = target.generation
        if target.generation is not None:
            return target.generation
        assert target.claim is not None
        word: dict[str, Any] = {"changed": self._planner.changed(flat)}
        error = None
        if self._comm.rank == 0:
            try:
                word["generation"] = target.claim()
            except Exception as problem:
                error = problem
        agree(self._comm, error, timeout, f"opening {target.location}")
        words = [json.loads(reply) for reply in self._comm.all_gather(json.dumps(word).encode(), timeout)]
        if any(word["changed"] for word in words):
            self._planner.together_next()
        self.generation = int(words[0]["generation"])
        return self.generation

    def _fill(self, job: _Job, plan: Plan, flat: FlatState, check_replicas: bool) -> None:
        self._arena.reserve(plan.image.fixed_nbytes + _TAIL_ROOM)
        job.checksums = snapshot(plan.image, plan.leaves_in_order(flat), self._arena)
        if check_replicas:
            job.replica_crcs = replica_crcs(flat)

    def _finish(self, job: _Job) -> None:
        """Bring a snapshot through the background part of a save, and tell the handle how it ended."""
        stats = None
        try:
            stats = self._commit(job)
        except Exception as problem:
            # Every rank comes here where the attempt failed on any, so all plan together at the next save.
            job.error = job.error or problem
            self._planner.together_next()
        job.handle.staged.reach(error=job.error)
        job.handle.durable.reach(stats, job.error)
        if job.error is None and self._comm.rank == 0 and job.target.committed is not None:
            try:
                job.target.committed(job.generation)
            except Exception as problem:
                _log.warning("%s: cleaning up after the commit failed: %s", job.handle.path, problem)

    def _commit(self, job: _Job) -> SaveStats:
        """Bring a snapshot to the storage and through the commit; returns when the outcome is known."""
        target = job.target
        data = attempt_directory(target.directory, job.attempt)
        store = self._comm.store() or StorageStore(target.storage, join(data, "receipts"))
        channel = Channel(store, job.attempt, self._comm.rank, self._comm.world_size)
        if self._comm.rank != 0:
            receipt, written = self._write(job, data)
            channel.send(receipt)
            try:
                outcome = channel.outcome(job.deadline)
            except CheckpointError:
                # Rank 0 may have published and then lost its voice: our own attempt in the manifest means success.
                if not self._published(job):
                    raise
                outcome = Outcome(plan_together=True)
        else:
            receipt, written, outcome = self._coordinate(job, data, channel)
        if outcome.plan_together:
            self._planner.together_next()
        if outcome.error:
            raise _KINDS.get(outcome.kind, SaveFailedError)(f"{target.location} was not committed: {outcome.error}")
        assert receipt.archive is not None
        return SaveStats(
            step=target.step,
            path=target.location,
            nbytes=receipt.archive.nbytes,
            waited_seconds=job.waited,
            stall_seconds=job.stall,
            written_seconds=written,
            durable_seconds=time.monotonic() - job.started,
        )

    def _published(self, job: _Job) -> bool:
        entry = Entry(step=job.target.step, generation=job.generation, directory=job.target.directory)
        try:
            return read_manifest(job.target.storage, entry).attempt == job.attempt
        except CheckpointError:
            return False

    def _write(self, job: _Job, data: str) -> tuple[Receipt, float]:
        """Write this rank's archive; what goes wrong is in the receipt, and in `job.error`."""
        rank, began = self._comm.rank, time.monotonic()
        try:
            if job.error is not None:
                raise job.error
            assert job.plan is not None
            assert job.values is not None
            assert job.checksums is not None
            image = job.plan.image
            tail = build_tail(image, job.values.entries(rank), job.checksums.entries, job.checksums.blocks)
            nbytes = image.fixed_nbytes + len(tail)
            self._arena.append(image.fixed_nbytes, tail)
            job.target.storage.write_archive(join(data, image.name), self._arena.address, nbytes)
            record = ArchiveRecord(image.name, nbytes, image.fixed_nbytes, hashlib.sha256(tail).hexdigest())
        except Exception as problem:
            job.error = problem
            return Receipt(rank, None, error=f"{problem}" or type(problem).__name__), time.monotonic() - began
        rows = b"" if self._reported is job.plan else job.plan.rows.encode()
        receipt = Receipt(
            rank=rank,
            archive=record,
            value_paths=job.values.paths,
            digests=job.values.digests,
            replica_crcs=job.replica_crcs,
            rows=rows,
            alone=job.plan.alone,
            directory=job.target.directory,
        )
        self._reported = job.plan
        return receipt, time.monotonic() - began

    def _coordinate(self, job: _Job, data: str, channel: Channel) -> tuple[Receipt, float, Outcome]:
        """Rank 0: write, collect, compare, publish; whatever happens, all ranks hear of it."""
        target, storage = job.target, job.target.storage
        receipt, written = Receipt(0, None, error="it did not come to write"), 0.0
        try:
            assert self._coordinator is not None
            storage.make_directory(data)
            with Lease(storage, data):
                receipt, written = self._write(job, data)
                receipts = collect(channel, receipt, job.deadline)
                layout, layout_record = self._coordinator.layout(receipts)
                storage.write_bytes(join(data, layout_record.name), layout)
                manifest = Manifest(
                    step=target.step,
                    generation=job.generation,
                    parent=target.parent,
                    attempt=job.attempt,
                    world_size=self._comm.world_size,
                    block_nbytes=BLOCK_NBYTES,
                    archives=tuple(item.archive for item in receipts if item.archive is not None),
                    layout=layout_record,
                    metadata=dict(target.metadata),
                )
                publish(storage, target.directory, manifest)
            outcome = Outcome(plan_together=any(item.alone for item in receipts))
        except Exception as problem:
            kind = type(problem).__name__
            outcome = Outcome(error=f"{problem}" or kind, plan_together=True, kind=kind)
        try:
            channel.announce(outcome)
        except CheckpointError as problem:
            # What is published is durable, whoever hears of it.
            _log.warning("%s: the other ranks could not be told how the save ended: %s", target.location, problem)
        if outcome.error:
            self._discard(job, data, channel)
        return receipt, written, outcome

    def _discard(self, job: _Job, data: str, channel: Channel) -> None:
        """Give back the room that a failed attempt takes, once no rank writes into it: the next one may need it."""
        target, storage = job.target, job.target.storage
        if self._comm.store() is None:
            return  # the other ranks find the outcome in there; it is swept as a leftover
        try:
            if not channel.drain(min(job.deadline, time.monotonic() + _DRAIN_SECONDS)):
                return  # a rank may still be writing, or is dead: swept as well
            # A publication whose own sync failed may have come all the same.
            if not storage.exists(join(target.directory, manifest_name(job.generation))):
                storage.delete_tree(data)
                if target.directory:
                    storage.remove_directory(target.directory)
        except CheckpointError as problem:
            _log.warning("%s: what the failed save left is swept later: %s", target.location, problem)


# Saves in flight when the interpreter ends are waited for: a checkpoint that was asked for is not dropped silently.
_living: weakref.WeakSet[Saver] = weakref.WeakSet()


def _wait_for_all() -> None:
    for saver in list(_living):
        try:
            saver.settle(DEFAULT_TIMEOUT)
        except DeadlineError as error:
            _log.error("%s", error)
        saver.report()


def _after_fork() -> None:
    for saver in list(_living):
        saver.after_fork()


atexit.register(_wait_for_all)
os.register_at_fork(after_in_child=_after_fork)
