"""How the ranks agree on the step after which they all stop, beside the training."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptengine.comm.base import KeyValueStore
from ckptengine.comm.process import Process
from ckptengine.schema.ranks import name_ranks

__all__ = ["Agreement", "Limit", "Request", "Verdict"]

_FOREVER = 3600.0
_LEAST_ANSWER_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
"""How long all ranks may take to say how far they are, without a grace period; with one, half of it. Their threads say
it, whatever the training does, unless C code keeps all Python threads from running. Where nobody says how long there
is, 30 s is what launchers commonly leave between SIGTERM and SIGKILL (torchrun, SLURM's `KillWait`, Kubernetes)."""
_POLLED_ANSWER_SECONDS = 70.0
"""How long it takes at least through files: NFS may show another machine's file only after 60 s (`acdirmax`)."""
_WORD_SECONDS = 2.0
"""How much longer than rank 0 the others wait, for its word."""
_HELD_SECONDS = 1.0
"""How long a rank is held back at most in the first turns, where messages come at once."""
_BETWEEN_SECONDS = 0.2
"""How long training goes on after the first turn, where a rank has ended it, before the next."""
_DOUBLED = 4
"""How often these two times are doubled at most."""
_FIRST_PAUSE = 0.001
_LOOK_SECONDS = 0.5
"""How often it is looked whether a rank that is late is dead."""
_LOOKS_PER_SECOND = 100
"""How often all ranks together may look for a request where a store can't wait."""


@dataclass(frozen=True, slots=True)
class Request:
    """Why the job is to end, and within how many seconds (None: no bound)."""

    reason: str
    grace: float | None


@dataclass(frozen=True, slots=True)
class Limit:
    """What a rank says: the call of `step` that it does not go past without a verdict.

    `gone`: it will come to no other, because it has closed ("closed"), has failed ("failed") or is dead ("dead").
    """

    call: int
    gone: Literal["", "closed", "failed", "dead"] = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What rank 0 makes of all limits.

    "stop": all save in call number `call` and end. "over": a rank has finished its training, so all may. "failed": it
    can't be done, `why` says why. "again": a rank has trained on, and all tell new limits.
    """

    kind: Literal["stop", "over", "failed", "again"]
    call: int = 0
    why: str = ""


class Agreement:
    """The messages of one Checkpointer's life, in a store; every wait is a thread's that does nothing else.

    The keys: `request`, set by the rank that is told to end; `wake/<rank>`, by which rank 0 passes it on to each
    (a key for each, so that a rank can also wake itself, to close); `limit/<rank>`, the answers; `verdict/<turn>`,
    which is the greatest of them; `left/<rank>`, set by a rank that needs the store no more; `process/<rank>`, by which
    ranks of the same machine see who is dead. `timeout`, in seconds, bounds the wait for answers where no grace period
    does.

    A rank that is held back by its limit may be what another waits for whose threads can't answer, since that one's
    training keeps the interpreter's lock while it waits. So none is held back for long: it claims the verdict of this
    turn for "again", and trains on; then all tell new limits, in the next turn. The store decides whether that word or
    rank 0's verdict counts, so that all ranks go by the same, and none needs another to find out.
    """

    def __init__(self, store: KeyValueStore, rank: int, world_size: int, prefix: str, timeout: float) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._prefix = prefix
        self._closed = threading.Event()
        self._telling, self._gone = threading.Lock(), False
        self._begun: float | None = None
        self._pause = max(1.0, world_size / _LOOKS_PER_SECOND)
        self._least = _LEAST_ANSWER_SECONDS if store.blocks else _POLLED_ANSWER_SECONDS + 3 * self._pause
        self._answer_seconds = max(self._least, min(timeout, _ANSWER_SECONDS))

    @property
    def seconds(self) -> float:
        """How long it takes at most from a request to a verdict on any rank."""
        return self._answer_seconds + _WORD_SECONDS + self._pause

    def request(self, request: Request) -> None:
        """Ask all ranks to end; of several requests one counts."""
        self._set("request", [request.reason, request.grace])

    def wait(self) -> Request | None:
        """Wait until a rank asks; return None where this rank closes before."""
        key = self._waited_for
        if self._store.blocks:  # messages that are files are written where they are needed only
            self._set(f"process/{self._rank}", Process.this().to_json())
        while not self._closed.is_set():
            found = self._get(key, _FOREVER if self._store.blocks else 0.0)
            if self._closed.is_set():
                return None
            if found is not None:
                request = Request(*found)
                if request.grace is not None:
                    self._answer_seconds = max(self._least, request.grace / 2)
                if self._rank == 0:
                    others = range(1, self._world_size)
                    self._store.set_each({self._key(f"wake/{rank}"): json.dumps(found).encode() for rank in others})
                return request
            if not self._store.blocks:
                self._closed.wait(self._pause)
        return None

    @property
    def _waited_for(self) -> str:
        return "request" if self._rank == 0 else f"wake/{self._rank}"

    def close(self, failed: bool) -> None:
        """End the wait, and tell those who may still ask that this rank comes to no further call of `step`."""
        self._closed.set()
        if self._store.blocks or failed:
            self.publish(Limit(0, gone="failed" if failed else "closed"))
        if self._store.blocks:
            self._set(self._waited_for, ["", None])

    def forget(self) -> None:
        """Remove the word that ended the wait, once it has."""
        self._store.delete(self._key(self._waited_for))
        self._store.delete(self._key(f"process/{self._rank}"))

    def publish(self, limit: Limit, turn: int = 0) -> None:
        """Tell this rank's limit in a turn; one that is gone is so in all."""
        with self._telling:
            self._gone = self._gone or bool(limit.gone)
            if limit.gone or not self._gone:
                self._set(f"limit/{self._rank}", [turn, limit.call, limit.gone])

    def patience(self, turn: int) -> float:
        """Return for how many seconds a rank is held back in a turn; in the end long enough for a slow machine."""
        return _growth(turn // 2) * (_HELD_SECONDS + self._world_size / 1000 if self._store.blocks else self._least)

    def pause(self, turn: int) -> float:
        """Return for how many seconds training goes on after a turn that a rank has ended; in the end longer than what
        keeps a rank from answering.
        """
        return _growth(turn) * _BETWEEN_SECONDS

    def give_way(self, turn: int) -> Verdict | None:
        """End a turn in which this rank was held back for too long; return its verdict where there is one by now."""
        return self._claim(turn, Verdict("again"))

    def decide(self, turn: int) -> Verdict | None:
        """Rank 0: hear all limits, and tell the verdict; None where a rank has ended this turn without one."""
        limits = self._collect(turn)
        # Where the turn has ended, what stands counts: a rank has gone on, or has given up on this one.
        return self._claim(turn, Verdict("again") if limits is None else _verdict(limits))

    def hear(self, turn: int) -> Verdict | None:
        """The other ranks: wait for the verdict, as long as rank 0 may live; None where there is none in this turn.

        Who gives up says so in rank 0's place: it may have been late, and all go by what the store has.
        """
        begun, least = self._begin(), self._least + _WORD_SECONDS
        while (found := self._get(f"verdict/{turn}", max(_LOOK_SECONDS, begun + least - time.monotonic()))) is None:
            waited = time.monotonic() - begun
            why = "rank 0 ended without a word" if waited >= least and self._is_dead(0) else ""
            if why or waited > self._answer_seconds + _WORD_SECONDS:
                failed = Verdict("failed", why=why or "rank 0 did not answer")
                return Verdict("over") if self._closed.is_set() else self._claim(turn, failed)
        return self._read(found)

    def _begin(self) -> float:
        """Return the moment at which the first turn began: all turns together have the time for the answers."""
        if self._begun is None:
            self._begun = time.monotonic()
        return self._begun

    def _claim(self, turn: int, verdict: Verdict) -> Verdict | None:
        own = json.dumps([verdict.kind, verdict.call, verdict.why, secrets.token_hex(8)])
        return self._read(json.loads(self._store.claim(self._key(f"verdict/{turn}"), own.encode())))

    def _read(self, found: list[Any]) -> Verdict | None:
        verdict = Verdict(*found[:3])
        return None if verdict.kind == "again" else verdict

    def _collect(self, turn: int) -> dict[int, Limit | None] | None:
        """Wait for all limits; for those that are late, only as long as their ranks may live.

        Return None where a rank has ended this turn.
        """
        begun, pause = self._begin(), _FIRST_PAUSE
        limits: dict[int, Limit | None] = dict.fromkeys(range(self._world_size))
        while missing := [rank for rank, limit in limits.items() if limit is None]:
            ended, *found = self._get_each([f"verdict/{turn}", *(f"limit/{rank}" for rank in missing)])
            if ended is not None:
                return None
            for rank, said in zip(missing, found, strict=True):
                if said is not None and (said[0] == turn or said[2]):
                    limits[rank] = Limit(*said[1:])
            if any(limit is not None and limit.gone == "failed" for limit in limits.values()):
                break  # those of the others are of no use
            late = [rank for rank in missing if limits[rank] is None]
            waited = time.monotonic() - begun
            if dead := [rank for rank in late if waited > self._least and self._is_dead(rank)]:
                limits[dead[0]] = Limit(0, gone="dead")
                break
            if waited > self._answer_seconds:
                break
            if late:
                time.sleep(pause)
                pause = min(2 * pause, _LOOK_SECONDS)
        return limits

    def _is_dead(self, rank: int) -> bool:
        """Return whether a rank is a process of this machine that doesn't live; False where that can't be seen."""
        found = self._get(f"process/{rank}", 0.0) if self._store.blocks else None
        if found is None:
            return False
        process = Process.of_json(found)
        return process is not None and process.is_alive() is False

    def depart(self, seconds: float) -> None:
        """Leave the store; rank 0, who may be its host, waits at most so many seconds until all others have."""
        self._closed.set()
        if self._rank != 0:
            self._set(f"left/{self._rank}", [])
            return
        deadline = time.monotonic() + seconds
        for rank in range(1, self._world_size):
            self._get(f"left/{rank}", max(0.0, deadline - time.monotonic()))
        for rank in range(self._world_size):
            for key in (f"wake/{rank}", f"limit/{rank}", f"left/{rank}", f"process/{rank}"):
                self._store.delete(self._key(key))
        turn = 0
        while self._get(f"verdict/{turn}", 0.0) is not None:
            self._store.delete(self._key(f"verdict/{turn}"))
            turn += 1
        self._store.delete(self._key("request"))

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _set(self, key: str, value: list[object] | dict[str, Any]) -> None:
        self._store.set(self._key(key), json.dumps(value).encode())

    def _get_each(self, keys: Sequence[str]) -> list[Any]:
        found = self._store.get_each([self._key(key) for key in keys])
        return [None if data is None else json.loads(data) for data in found]

    def _get(self, key: str, seconds: float) -> Any:
        data = self._store.get(self._key(key), seconds)
        return None if data is None else json.loads(data)


def _growth(turn: int) -> float:
    return 2.0 ** min(turn, _DOUBLED)


def _verdict(limits: dict[int, Limit | None]) -> Verdict:
    """Return what follows from the ranks' limits; None is a rank that did not answer."""
    known = [limit for limit in limits.values() if limit is not None]
    failed = [rank for rank, limit in limits.items() if limit is not None and limit.gone == "failed"]
    dead = [rank for rank, limit in limits.items() if limit is not None and limit.gone == "dead"]
    missing = [rank for rank, limit in limits.items() if limit is None]
    if dead:
        return Verdict("failed", why=f"{name_ranks(dead)} ended without a word")
    if failed:
        return Verdict("failed", why=f"{name_ranks(failed)} ended with an error")
    if missing:
        return Verdict("failed", why=f"{name_ranks(missing)} did not answer")
    if any(limit.gone for limit in known):
        return Verdict("over")
    return Verdict("stop", max(limit.call for limit in known))
