"""How the ranks agree on the step after which they all stop, beside the training."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

from ckptengine.comm.base import KeyValueStore
from ckptengine.comm.ranks import name_ranks

__all__ = ["Agreement", "Limit", "Request", "Verdict"]

_FOREVER = 3600.0
_ANSWER_SECONDS = 5.0
"""How long all ranks may take to say how far they are. Their threads say it, whatever the training does; who doesn't is
dead, or has not been able to run any Python for so long."""
_POLLED_ANSWER_SECONDS = 70.0
"""The same through files: NFS may show another machine's file only after 60 s (`acdirmax`)."""
_WORD_SECONDS = 2.0
"""How much longer than rank 0 the others wait, for its word."""
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

    `fresh`: it has not come to any since the state was made or restored. `gone`: it will come to no other, because
    it has closed ("closed") or has failed ("failed").
    """

    call: int
    fresh: bool = False
    gone: Literal["", "closed", "failed"] = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What rank 0 makes of all limits.

    "stop": all save in call number `call` and end. "leave": nothing has been trained that isn't saved, all end.
    "over": a rank has finished its training, so all may. "failed": it can't be done, `why` says why.
    """

    kind: Literal["stop", "leave", "over", "failed"]
    call: int = 0
    why: str = ""


class Agreement:
    """The messages of one Checkpointer's life, in a store; every wait is a thread's that does nothing else.

    The keys: `request`, set by the rank that is told to end; `wake/<rank>`, by which rank 0 passes it on to each
    (a key for each, so that a rank can also wake itself, to close); `limit/<rank>`, the answers; `verdict`, which is
    the greatest of them; `left/<rank>`, set by a rank that needs the store no more.
    """

    def __init__(self, store: KeyValueStore, rank: int, world_size: int, prefix: str) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._prefix = prefix
        self._closed = threading.Event()
        self._pause = max(1.0, world_size / _LOOKS_PER_SECOND)
        self.answer_seconds = _ANSWER_SECONDS if store.blocks else _POLLED_ANSWER_SECONDS + 3 * self._pause
        """How long it takes at most from a request to a verdict on rank 0."""

    @property
    def seconds(self) -> float:
        """How long it takes at most from a request to a verdict on any rank."""
        return self.answer_seconds + _WORD_SECONDS + self._pause

    def request(self, request: Request) -> None:
        """Ask all ranks to end; of several requests one counts."""
        self._set("request", [request.reason, request.grace])

    def wait(self) -> Request | None:
        """Wait until a rank asks; return None where this rank closes before."""
        key = self._waited_for
        while not self._closed.is_set():
            found = self._get(key, _FOREVER if self._store.blocks else 0.0)
            if self._closed.is_set():
                return None
            if found is not None:
                request = Request(*found)
                if self._rank == 0:
                    for rank in range(1, self._world_size):
                        self._set(f"wake/{rank}", found)
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
        if self._store.blocks or failed:  # messages that are files are written where they are needed only
            self.publish(Limit(0, gone="failed" if failed else "closed"))
        if self._store.blocks:
            self._set(self._waited_for, ["", None])

    def forget(self) -> None:
        """Remove the word that ended the wait, once it has."""
        self._store.delete(self._key(self._waited_for))

    def publish(self, limit: Limit) -> None:
        """Tell this rank's limit."""
        self._set(f"limit/{self._rank}", [limit.call, limit.fresh, limit.gone])

    def decide(self) -> Verdict:
        """Rank 0: hear all limits, and tell the verdict."""
        verdict = _verdict(self._collect())
        self._set("verdict", [verdict.kind, verdict.call, verdict.why])
        return verdict

    def hear(self) -> Verdict:
        """The other ranks: wait for the verdict."""
        found = self._get("verdict", self.answer_seconds + _WORD_SECONDS)
        return Verdict(*found) if found is not None else Verdict("failed", why="rank 0 did not answer")

    def _collect(self) -> dict[int, Limit | None]:
        deadline = time.monotonic() + self.answer_seconds
        limits: dict[int, Limit | None] = {}
        for rank in range(self._world_size):
            found = self._get(f"limit/{rank}", max(0.0, deadline - time.monotonic()))
            limits[rank] = limit = None if found is None else Limit(*found)
            if limit is not None and limit.gone == "failed":
                break  # no use to wait for the others
        return limits

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
            for key in (f"wake/{rank}", f"limit/{rank}", f"left/{rank}"):
                self._store.delete(self._key(key))
        self._store.delete(self._key("verdict"))
        self._store.delete(self._key("request"))

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _set(self, key: str, value: list[object]) -> None:
        self._store.set(self._key(key), json.dumps(value).encode())

    def _get(self, key: str, seconds: float) -> Any:
        data = self._store.get(self._key(key), seconds)
        return None if data is None else json.loads(data)


def _verdict(limits: dict[int, Limit | None]) -> Verdict:
    """Return what follows from the ranks' limits; None is a rank that did not answer."""
    known = [limit for limit in limits.values() if limit is not None]
    failed = [rank for rank, limit in limits.items() if limit is not None and limit.gone == "failed"]
    missing = [rank for rank, limit in limits.items() if limit is None]
    if failed:
        return Verdict("failed", why=f"{name_ranks(failed)} ended with an error")
    if missing:
        return Verdict("failed", why=f"{name_ranks(missing)} did not answer")
    if any(limit.gone for limit in known):
        return Verdict("over")
    if all(limit.fresh for limit in known):
        return Verdict("leave")
    return Verdict("stop", max(limit.call for limit in known))
