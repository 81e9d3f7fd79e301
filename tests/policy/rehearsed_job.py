"""A job of some ranks as a rehearsal: what it does in its steps, what fails, and how each rank ends, all by a seed."""

from __future__ import annotations

import contextlib
import random
import signal
import types
from collections.abc import Callable
from typing import Any

from rehearsal import Gone, Rehearsal

import ckptengine as ce
from ckptengine.comm import keyvalue
from ckptengine.comm.base import KeyValueStore
from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.errors import CheckpointError
from ckptengine.policy import agreement, ending, watch

__all__ = ["FAILS", "LOCKED", "MIXED", "Job", "take_over"]

LOCKED = "all wait for each other in each step, and keep the lock meanwhile"
MIXED = "in some steps all wait for each other, in some one for the others' later calls; some keep the lock meanwhile"
FAILS = "as before, and stores fail, or a rank dies, raises or ends early"


class Lost(Exception):
    """A rank has noticed that another one has ended."""


class _Store(KeyValueStore):
    """What a rank has of the job's store: calls take their time, and some fail before or after they have come."""

    blocks = True

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._inner = job, job.store
        self._calls = 0
        self._first, self._last, self._comes, self._claims_fail = job.faults.get(rank, (0, -1, False, False))

    def _call(self, call: Callable[[], Any], claims: bool = False) -> Any:
        rehearsal = self._job.rehearsal
        rehearsal.sleep(rehearsal.random.choice([0.0, 0.0, 0.0005, 0.02]))
        self._calls += 1
        fails = self._first <= self._calls <= self._last or (claims and self._claims_fail)
        if fails and not self._comes:
            raise CheckpointError("the store fails")
        found = call()
        if fails:
            raise CheckpointError("the store fails when the call has come")
        return found

    def set(self, key: str, value: bytes) -> None:
        self._call(lambda: self._inner.set(key, value))

    def get(self, key: str, timeout: float) -> bytes | None:
        found: bytes | None = self._call(lambda: self._inner.get(key, timeout))
        return found

    def delete(self, key: str) -> None:
        self._call(lambda: self._inner.delete(key))

    def claim(self, key: str, value: bytes) -> bytes:
        standing: bytes = self._call(lambda: self._inner.claim(key, value), claims=True)
        return standing


class _Comm:
    def __init__(self, job: Job, rank: int) -> None:
        self._job, self.rank, self.world_size = job, rank, job.size

    def store(self) -> KeyValueStore:
        return _Store(self._job, self.rank)

    def barrier(self, timeout: float) -> None:
        self._job.meet(self._job.leaving, self.rank, timeout)


class Job:
    """A job; `run` returns how each rank has ended: "stopped" at the call in `stopped`, "finished", or why else."""

    def __init__(self, seed: int, kind: str) -> None:
        plan = random.Random(f"{kind} {seed}")
        self.rehearsal = Rehearsal(seed)
        self.size, self.calls, self.pace = plan.choice([2, 3, 4]), 30, plan.choice([0.001, 0.02, 0.3])
        self.passed = [0] * self.size
        self.longest = 0.0  # time in one call
        self.ended: dict[int, str] = {}
        self.stopped: dict[int, int] = {}
        self.saving: set[int] = set()
        self.leaving: set[int] = set()
        # Of each call: which ranks keep the lock in the wait after it, who waits alone, and for how many calls more.
        self.waits: dict[int, tuple[set[int], int | None, int]] = {}
        call = 1
        while call <= self.calls:
            alone = plan.randrange(self.size) if kind != LOCKED and plan.random() < 0.3 else None
            keep = set(range(self.size)) if kind == LOCKED else {r for r in range(self.size) if plan.random() < 0.3}
            ahead = 0 if alone is None else plan.choice([0, 1])
            if kind == LOCKED or plan.random() < 0.8:
                self.waits[call] = keep if alone is None else {alone}, alone, ahead
            call += 1 + ahead
        told = plan.sample(range(self.size), plan.choice([1, 1, 2]))
        moment = plan.random() * self.calls * self.pace / 3
        self.told = {rank: plan.choice([moment, moment + plan.random()]) for rank in told}
        self.told_late: set[int] = set()  # who is told when it knows the verdict
        self.faults: dict[int, tuple[int, int, bool, bool]] = {}
        self.fates: dict[int, tuple[str, int]] = {}
        if kind == FAILS and plan.random() < 0.5:
            self.fates = {plan.randrange(self.size): (plan.choice(["die", "raise", "close"]), plan.randrange(1, 20))}
        elif kind == FAILS:
            first, comes, claims = plan.randrange(1, 16), plan.random() < 0.5, plan.random() < 0.5
            last = 0 if claims else first + plan.choice([0, 1, 1000])
            self.faults = {plan.randrange(self.size): (first, last, comes, claims)}

    def run(self) -> dict[int, str]:
        """Run the ranks; raises `Stuck` where they don't all end."""
        self.store = MemoryStore()
        for rank in range(self.size):
            self.rehearsal.start(rank, lambda rank=rank: self._main(rank))
        self.rehearsal.run(3000.0)
        return self.ended

    def end(self, rank: int, how: str) -> None:
        """End a rank's process."""
        self.ended.setdefault(rank, how)
        self.rehearsal.end(rank)

    def meet(self, there: set[int], rank: int, seconds: float) -> None:
        """Wait for all ranks that live."""
        there.add(rank)
        self.rehearsal.block(lambda: all(r in there or r in self.ended for r in range(self.size)), seconds)

    def _main(self, rank: int) -> None:
        one = watch.Watch(ce.Preemption(), _Comm(self, rank), None, "life", "run", 600.0, lambda: None)
        if rank in self.told:
            self.rehearsal.spawn(rank, lambda: self._tell(one, self.told[rank]))
        try:
            how = self._train(rank, one)
        except (Lost, CheckpointError) as error:
            how = f"raised {error!r}"
        if how != "stopped":
            one.close(how != "finished")
        self.ended.setdefault(rank, how)

    def _tell(self, one: watch.Watch, moment: float) -> None:
        self.rehearsal.sleep(moment)
        if one._comm.rank in self.told_late:
            self.rehearsal.block(lambda: one._verdict is not None)
        if one._subscription is not None and not one._closed.is_set():
            one._signalled(signal.SIGTERM)

    def _train(self, rank: int, one: watch.Watch) -> str:
        rehearsal, fate = self.rehearsal, self.fates.get(rank, ("", 0))
        for call in range(1, self.calls + 1):
            rehearsal.sleep(self.pace * rehearsal.random.random())
            match fate:
                case ("die", at) if at == call:
                    self.end(rank, "died")
                    raise Gone
                case ("raise", at) if at == call:
                    raise Lost("its own error")
                case ("close", at) if at == call:
                    return "finished"
            began, stops = rehearsal.now, one.arrive()
            self.longest = max(self.longest, rehearsal.now - began)
            if stops:
                self.stopped[rank] = call
                one.saving(call)
                self.meet(self.saving, rank, 60.0)
                with contextlib.suppress(CheckpointError):
                    one._depart()
                return "stopped"
            self.passed[rank] = call
            if call in self.waits:
                self._wait(rank, call)
        return "finished"

    def _wait(self, rank: int, call: int) -> None:
        keep, alone, ahead = self.waits[call]
        last = min(call + ahead, self.calls)
        if alone in (None, rank):
            wait = self.rehearsal.hold if rank in keep else self.rehearsal.block
            wait(lambda: all(self._is_past(other, last) for other in range(self.size) if other != rank))
        if any(self.ended.get(other, "finished") not in ("finished", "stopped") for other in range(self.size)):
            raise Lost("another rank has ended")

    def _is_past(self, rank: int, call: int) -> bool:
        return self.passed[rank] >= call or rank in self.ended or rank in self.stopped


def take_over(job: Job, patch: Any) -> None:
    """Have what is rehearsed run in a job's rehearsal; `patch` is pytest's `monkeypatch`."""
    for module in (agreement, watch, ending, keyvalue):
        patch.setattr(module, "threading", job.rehearsal.threads)
        patch.setattr(module, "time", job.rehearsal.clock)

    def process(rank: int) -> Any:
        return types.SimpleNamespace(to_json=lambda: {"rank": rank}, is_alive=lambda: rank not in job.ended)

    known = types.SimpleNamespace(
        this=lambda: process(job.rehearsal.rank), of_json=lambda found: process(found["rank"])
    )
    patch.setattr(agreement, "Process", known)
    patch.setattr(watch, "subscribe", lambda *wanted: types.SimpleNamespace(close=lambda: None))
    patch.setattr(watch, "is_shared", lambda number: False)
    patch.setattr(watch, "_living", set())
    patch.setattr(watch, "_act", lambda numbers: None)

    def end(one: ending.Ending, why: str, code: int | None = None) -> None:
        job.end(one._rank, why)
        raise Gone

    patch.setattr(ending.Ending, "end", end)
