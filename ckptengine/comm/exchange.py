"""Collective operations over nothing but a key-value store: no process group is needed, and none can hang."""

from __future__ import annotations

import json
import secrets
import struct
import time
from collections.abc import Sequence

from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.comm.keyvalue import delete_large, get_large, put_large
from ckptengine.comm.ranks import name_ranks
from ckptengine.errors import DeadlineError

__all__ = ["StoreCommunicator", "connect"]

_COUNT = struct.Struct("<Q")
_GAVE_UP = b"-"


class StoreCommunicator(Communicator):
    """Ranks that exchange values through a store.

    Operation number n: every rank puts its value under `<prefix>/<n>/in/<rank>`, rank 0 collects them and
    publishes the answer, which may also be who is missing, under `<prefix>/<n>/out`. Rank 0 then deletes the
    values, and the answer once all ranks have come to a later operation: only then has every rank read it.

    `prefix` must be one that no other life of the job uses in the same store; `connect` finds one.
    `store` is used by the caller's thread; `background` is what `store()` returns.
    """

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        world_size: int,
        prefix: str,
        background: KeyValueStore | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._prefix = prefix
        self._background = background
        self._number = 0
        self._answered: list[tuple[int, bool]] = []

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        """Return every rank's value, in the order of the ranks."""
        return _unpack(self._exchange("all-gather", value, timeout, None))

    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        """Return the root's value on all ranks; it waits for all, as every operation does."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"root {root}: there are {self.world_size} ranks")
        if (value is None) == (self.rank == root):
            raise ValueError(f"broadcast: rank {root} passes the value and the others None; this is rank {self.rank}")
        return _unpack(self._exchange("broadcast", value or b"", timeout, root))[0]

    def barrier(self, timeout: float) -> None:
        """Return when all ranks have come."""
        self._exchange("barrier", b"", timeout, 0)

    def meet(self, timeout: float, within: float) -> None:
        """Be the barrier that ends `connect`; `within` is the time that its errors tell."""
        self._exchange("connecting", b"", timeout, 0, within)

    def store(self) -> KeyValueStore | None:
        """Return the store for background messages, where it is safe for that."""
        return self._background

    def entered(self, number: int, rank: int) -> bool:
        """Return whether a rank has come to an operation that rank 0 has not answered yet."""
        return self._store.get(self._in(number, rank), 0.0) is not None

    def _in(self, number: int, rank: int) -> str:
        return f"{self._prefix}/{number}/in/{rank}"

    def _out(self, number: int) -> str:
        return f"{self._prefix}/{number}/out"

    def _exchange(
        self, name: str, value: bytes, timeout: float, only: int | None, within: float | None = None
    ) -> bytes:
        """Return the packed values of all ranks, or of rank `only`."""
        number, self._number = self._number, self._number + 1
        put_large(self._store, self._in(number, self.rank), b"+" + value)
        what = f"{name} (operation {number})"
        within = timeout if within is None else within
        if self.rank == 0:
            return self._collect(number, what, timeout, only, within)
        # Rank 0 may have entered later, and needs a moment to find and tell who is missing.
        reply = get_large(self._store, self._out(number), timeout + grace(timeout))
        if reply is None:
            missing = [rank for rank in range(self.world_size) if not self.entered(number, rank)]
            self._store.set(self._in(number, self.rank), b"=" + _GAVE_UP)
            raise DeadlineError(
                f"{what}: {name_ranks(missing)} did not come within {within:g} s"
                if missing
                else f"{what}: rank 0 did not answer within {within:g} s"
            )
        if reply[:1] == b"!":
            raise DeadlineError(str(json.loads(reply[1:])))
        return reply[1:]

    def _collect(self, number: int, what: str, timeout: float, only: int | None, within: float) -> bytes:
        deadline = time.monotonic() + timeout
        values: list[bytes] = []
        missing, given_up = [], []
        for rank in range(self.world_size):
            value = get_large(self._store, self._in(number, rank), max(0.0, deadline - time.monotonic()))
            if value is None:
                missing.append(rank)
            elif value[:1] == _GAVE_UP:
                given_up.append(rank)
            else:
                values.append(value[1:] if only is None or only == rank else b"")
        if not missing:
            # All have come here, so all have read the earlier answers.
            self._forget()
        if missing or given_up:
            came = f"{name_ranks(missing)} did not come within {within:g} s" if missing else ""
            gave = f"{name_ranks(given_up)} gave up waiting before" if given_up else ""
            message = f"{what}: {'; '.join(filter(None, (came, gave)))}"
            self._answered.append((number, False))
            put_large(self._store, self._out(number), b"!" + json.dumps(message).encode())
            raise DeadlineError(message)
        answer = _pack(values if only is None else [values[only]])
        self._answered.append((number, True))
        put_large(self._store, self._out(number), b"+" + answer)
        for rank in range(self.world_size):
            delete_large(self._store, self._in(number, rank))
        return answer

    def _forget(self) -> None:
        for number, complete in self._answered:
            delete_large(self._store, self._out(number))
            for rank in () if complete else range(self.world_size):
                delete_large(self._store, self._in(number, rank))
        self._answered.clear()


def connect(
    store: KeyValueStore,
    rank: int,
    world_size: int,
    timeout: float,
    prefix: str = "ckptengine",
    background: KeyValueStore | None = None,
) -> StoreCommunicator:
    """Return a communicator after all ranks have met, under a prefix that no earlier life has used.

    A store may outlive the job: torchrun's agent keeps one over restarts, with the keys of dead ranks. So
    each rank says hello with a number of its own, rank 0 answers to that number with the session's, and an
    answer to a dead rank's hello is never read. Raises `DeadlineError` naming the ranks that did not come.
    """
    if rank == 0:
        return _receive(store, world_size, timeout, prefix, background)
    own = secrets.token_hex(16)
    hello, welcome = f"{prefix}/hello/{rank}", f"{prefix}/welcome/{own}"
    store.set(hello, own.encode())
    session = store.get(welcome, timeout + grace(timeout))
    if session is None:
        raise DeadlineError(f"connecting: rank 0 did not come within {timeout:g} s")
    store.delete(welcome)
    communicator = StoreCommunicator(store, rank, world_size, f"{prefix}/{session.decode()}", background)
    communicator.meet(timeout, timeout)
    return communicator


def _receive(
    store: KeyValueStore,
    world_size: int,
    timeout: float,
    prefix: str,
    background: KeyValueStore | None,
) -> StoreCommunicator:
    deadline = time.monotonic() + timeout
    session = secrets.token_hex(8)
    communicator = StoreCommunicator(store, 0, world_size, f"{prefix}/{session}", background)
    answered: dict[int, bytes | None] = dict.fromkeys(range(1, world_size))
    pause = 0.001
    while answered and time.monotonic() < deadline:
        for rank, last in list(answered.items()):
            hello = store.get(f"{prefix}/hello/{rank}", 0.0)
            if hello is not None and hello != last:
                store.set(f"{prefix}/welcome/{hello.decode()}", session.encode())
                answered[rank] = hello
            elif communicator.entered(0, rank):
                del answered[rank]
        if answered:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    communicator.meet(max(0.0, deadline - time.monotonic()), timeout)
    for rank in range(1, world_size):
        store.delete(f"{prefix}/hello/{rank}")
    return communicator


def grace(timeout: float) -> float:
    """Return the seconds that a rank waits beyond its timeout for the word of rank 0: a tenth, 1 to 10 s."""
    return min(10.0, max(1.0, 0.1 * timeout))


def _pack(values: Sequence[bytes]) -> bytes:
    return b"".join((_COUNT.pack(len(values)), *(_COUNT.pack(len(value)) for value in values), *values))


def _unpack(packed: bytes) -> list[bytes]:
    (count,) = _COUNT.unpack_from(packed)
    position = _COUNT.size * (1 + count)
    values = []
    for number in range(count):
        (nbytes,) = _COUNT.unpack_from(packed, _COUNT.size * (1 + number))
        values.append(packed[position : position + nbytes])
        position += nbytes
    return values
