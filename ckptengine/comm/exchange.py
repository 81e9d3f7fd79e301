"""Collective operations over nothing but a key-value store: no process group is needed, and none can hang."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.comm.keyvalue import delete_large, delete_large_each, get_large, get_large_each, poll, put_large
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError
from ckptengine.schema.ranks import name_ranks

__all__ = ["StoreCommunicator", "connect"]

_COUNT = struct.Struct("<Q")
_GAVE_UP = b"-"
_TOGETHER = 512
"""Ranks that rank 0 asks the store for at once."""

_log = logging.getLogger("ckptengine")


class StoreCommunicator(Communicator):
    """Ranks that exchange values through a store.

    Operation number n: every rank puts its value under `<prefix>/<n>/in/<rank>`, rank 0 collects them and
    publishes the answer, which may also be who is missing, under `<prefix>/<n>/out`. Rank 0 then deletes the
    values, and the answer once all ranks have come to a later operation: only then has every rank read it.

    The numbers come together again after any failure, since rank 0 alone counts: each operation that it has entered
    gets an answer, and the other ranks go to the next number by that answer only. A rank that gave up before there was
    one comes again under the same number. One that finds an answer that was given without it raises it, for it may be
    late. But where that answer was about something else, is not the first such, or is of an operation on which it gave
    up itself, it has left one out: then it goes on to the operation that rank 0 is in, within the same call.

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
        self._left: int | None = None  # the operation that this rank gave up on
        self._late = False  # whether its last call ended with an answer that had been given without it
        self._answered: list[tuple[int, bool]] = []
        self._owed: dict[int, str] = {}  # rank 0: operations that it could not answer, and why

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

    def rendezvous(self, timeout: float, within: float) -> None:
        """Be the barrier that ends `connect`; `within` is the time that its errors tell."""
        self._exchange("connecting", b"", timeout, 0, within)

    def store(self) -> KeyValueStore | None:
        """Return the store for background messages, where it is safe for that."""
        return self._background

    def awaited(self) -> bool:
        """Return whether rank 0 is in an operation to which this rank has yet to come."""
        number = self._number
        while self._store.get(self._out(number), 0.0) is not None:
            number += 1  # it was answered without this rank
        return self.rank != 0 and self.entered(number, 0)

    def entered(self, number: int, rank: int) -> bool:
        """Return whether a rank has come to an operation that rank 0 has not answered yet."""
        return bool(self.all_entered(number, [rank]))

    def all_entered(self, number: int, ranks: Sequence[int]) -> list[int]:
        """Return which of some ranks have come to an operation that rank 0 has not answered yet."""
        found = self._store.get_each([self._in(number, rank) for rank in ranks])
        return [rank for rank, value in zip(ranks, found, strict=True) if value is not None]

    def _in(self, number: int, rank: int) -> str:
        return f"{self._prefix}/{number}/in/{rank}"

    def _out(self, number: int) -> str:
        return f"{self._prefix}/{number}/out"

    def _exchange(
        self, name: str, value: bytes, timeout: float, only: int | None, within: float | None = None
    ) -> bytes:
        """Return the packed values of all ranks, or of rank `only`."""
        label = f"{name} from rank {only}" if only else name
        call = _Call(label, value, only, timeout, timeout if within is None else within, self.about)
        return self._lead(call) if self.rank == 0 else self._follow(call)

    def _follow(self, call: _Call) -> bytes:
        """Any other rank: come, and do as rank 0 answers."""
        deadline, missed = time.monotonic() + call.timeout + grace(call.timeout), ""
        while True:
            number = self._number
            left, reply = self._left == number, None
            try:
                if left:
                    reply = get_large(self._store, self._out(number), 0.0)
                left = reply is not None
                if not left:
                    reply = self._come(call, number, deadline, bool(missed))
            except BaseException:
                self._leave(number, bool(missed))
                raise
            if reply is None:
                raise DeadlineError(missed or self._why_late(call, number))
            self._number, self._left = number + 1, None
            if reply[:1] == b"+" and not left:
                self._late = False
                if missed:
                    _log.warning("rank %d missed an operation, and is in step again: %s", self.rank, missed)
                return reply[1:]
            answer = _GONE if reply[:1] == b"+" else json.loads(reply[1:])
            was_in = self.rank not in answer["absent"] and not left
            if was_in or not self._has_left_out(call, answer["about"], left or bool(missed)):
                self._late = not was_in
                raise _KINDS[answer["kind"]](answer["text"])
            missed = missed or answer["text"]

    def _has_left_out(self, call: _Call, about: str, before: bool) -> bool:
        """Return whether an answer that was given without this rank is of something that it has left out.

        Else the rank is late for it. `before`: it knows of another one, or has told of this one at its last call.
        """
        if call.about and about:
            return call.about != about
        return before or self._late

    def _come(self, call: _Call, number: int, deadline: float, behind: bool) -> bytes | None:
        """Put this rank's value, and return rank 0's answer; None, after leaving, where there is none in time.

        A rank that is `behind` waits for rank 0's coming for a moment only: the others may be training already.
        """
        put_large(self._store, self._in(number, self.rank), call.encode())
        seconds = deadline - time.monotonic()
        if behind and not self._sees_leader(number, min(seconds, grace(call.timeout))):
            seconds = 0.0
        # Rank 0 may have entered later, and needs a moment to find and tell who is missing.
        reply = get_large(self._store, self._out(number), max(0.0, seconds))
        if reply is None:
            self._leave(number, behind)
            # It may have been answered between the two.
            reply = get_large(self._store, self._out(number), 0.0)
        return reply

    def _sees_leader(self, number: int, seconds: float) -> bool:
        """Wait for rank 0 to be in an operation, or to have answered it; return whether it is."""

        def look() -> bytes | None:
            return self._store.get(self._in(number, 0), 0.0) or self._store.get(self._out(number), 0.0)

        return poll(look, seconds) is not None

    def _leave(self, number: int, behind: bool) -> None:
        """Say that this rank does not wait any more; one that was behind, and came too early, has never come."""
        self._left = number
        with contextlib.suppress(CheckpointError):
            if behind:
                delete_large(self._store, self._in(number, self.rank))
            else:
                self._store.set(self._in(number, self.rank), b"=" + _GAVE_UP)

    def _why_late(self, call: _Call, number: int) -> str:
        what = call.at(number)
        entered = self.all_entered(number, range(self.world_size))
        missing = sorted(set(range(self.world_size)).difference(entered))
        if missing:
            return f"{what}: {name_ranks(missing)} did not come within {call.within:g} s"
        return f"{what}: rank 0 did not answer within {call.within:g} s"

    def _lead(self, call: _Call) -> bytes:
        """Rank 0: collect all values, and answer; whatever happens, there is an answer."""
        self._settle()
        number, self._number = self._number, self._number + 1
        what = call.at(number)
        self._owed[number] = f"{what}: rank 0 left it"
        try:
            put_large(self._store, self._in(number, 0), call.encode())
            came, missing, gave_up = self._collect(call, number)
            if not missing:
                # All have come here, so all have read the earlier answers.
                self._forget()
            error = _trouble(call, what, came, missing, gave_up)
            if error is None:
                values = [came[rank][1] for rank in range(self.world_size)]
                answer = _pack(values if call.only is None else [values[call.only]])
                put_large(self._store, self._out(number), b"+" + answer)
            else:
                text = _answer(str(error), missing + gave_up, type(error).__name__, call.about)
                put_large(self._store, self._out(number), b"!" + text)
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self._settle()
            raise
        del self._owed[number]
        self._answered.append((number, error is None))
        if error is not None:
            raise error
        with contextlib.suppress(CheckpointError):  # the operation is over; what stays does no harm
            delete_large_each(self._store, [self._in(number, rank) for rank in range(self.world_size)])
        return answer

    def _collect(self, call: _Call, number: int) -> tuple[dict[int, tuple[str, bytes]], list[int], list[int]]:
        """Return the labels and values of the ranks that came, those that did not, and those that gave up before."""
        deadline = time.monotonic() + call.timeout
        came: dict[int, tuple[str, bytes]] = {0: (call.label, call.value if call.only in (None, 0) else b"")}
        missing, gave_up = [], []
        for rank, value in self._values(number, deadline):
            if value == _GAVE_UP:
                # It may have come again meanwhile, in its next call.
                value = get_large(self._store, self._in(number, rank), 0.0)
            if value is None:
                missing.append(rank)
            elif value == _GAVE_UP:
                gave_up.append(rank)
            else:
                label, value = _decoded(value)
                came[rank] = label, value if call.only in (None, rank) else b""
        return came, missing, gave_up

    def _values(self, number: int, deadline: float) -> Iterator[tuple[int, bytes | None]]:
        """Yield the other ranks and what each has put, waiting for each until the deadline.

        Those that have come are asked for together, twice as many each time: most are there when the first is.
        """
        rank, together = 1, 1
        while rank < self.world_size:
            keys = [self._in(number, one) for one in range(rank, min(rank + together, self.world_size))]
            found: list[bytes | None] = get_large_each(self._store, keys) if together > 1 else [None]
            if found[0] is None:
                found[0] = get_large(self._store, keys[0], max(0.0, deadline - time.monotonic()))
            count = next((place for place, value in enumerate(found) if place and value is None), len(found))
            together = min(2 * together, _TOGETHER) if count == len(keys) else 1
            for value in found[:count]:
                yield rank, value
                rank += 1

    def _settle(self) -> None:
        """Answer the operations that could not be answered: else the others would wait for that at each call."""
        for number, text in list(self._owed.items()):
            # It may be there all the same: whoever has read it goes by it.
            if self._store.get(self._out(number), 0.0) is None:
                answer = _answer(text, list(range(1, self.world_size)))
                put_large(self._store, self._out(number), b"!" + answer)
            self._answered.append((number, False))
            del self._owed[number]

    def _forget(self) -> None:
        for number, complete in self._answered:
            values = [] if complete else [self._in(number, rank) for rank in range(self.world_size)]
            delete_large_each(self._store, [self._out(number), *values])
        self._answered.clear()


@dataclass(frozen=True, slots=True)
class _Call:
    """One rank's call of an operation.

    `only` is the rank whose value is asked for, `within` the time that errors tell, `about` what it is for.
    """

    label: str
    value: bytes
    only: int | None
    timeout: float
    within: float
    about: str

    def at(self, number: int) -> str:
        """Return how messages name the operation."""
        return f"{self.label} (operation {number})"

    def encode(self) -> bytes:
        """Return what travels; `_decoded` takes it apart."""
        return b"+" + self.label.encode() + b"\0" + self.value


def _decoded(data: bytes) -> tuple[str, bytes]:
    label, _, value = data[1:].partition(b"\0")
    return label.decode(), value


_KINDS: dict[str, type[CheckpointError]] = {kind.__name__: kind for kind in (DeadlineError, RankFailedError)}


_GONE: dict[str, Any] = {
    "text": "the others went on without this rank",
    "absent": [],
    "kind": "DeadlineError",
    "about": "",
}


def _answer(text: str, absent: Sequence[int], kind: str = "DeadlineError", about: str = "") -> bytes:
    """Return why an operation failed, as it travels; `absent` are the ranks that were not in it."""
    return json.dumps({"text": text, "absent": list(absent), "kind": kind, "about": about}).encode()


def _trouble(
    call: _Call, what: str, came: Mapping[int, tuple[str, bytes]], missing: Sequence[int], gave_up: Sequence[int]
) -> CheckpointError | None:
    """Return why an operation can't be done, None where it can."""
    if missing or gave_up:
        late = f"{name_ranks(missing)} did not come within {call.within:g} s" if missing else ""
        gave = f"{name_ranks(gave_up)} gave up waiting before" if gave_up else ""
        return DeadlineError(f"{what}: {'; '.join(filter(None, (late, gave)))}")
    for rank, (label, _) in came.items():
        if label != call.label:
            return RankFailedError(
                f"{what}: rank {rank} is in a {label}: all ranks must call the same in the same order"
            )
    return None


def connect(
    store: KeyValueStore,
    rank: int,
    world_size: int,
    timeout: float,
    prefix: str = "ckptengine",
    background: KeyValueStore | None = None,
    within: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StoreCommunicator:
    """Return a communicator after all ranks have met, under a prefix that no earlier life has used.

    A store may outlive the job: torchrun's agent keeps one over restarts, with the keys of dead ranks. So
    each rank says hello with a number of its own, rank 0 answers to that number with the session's, and an
    answer to a dead rank's hello is never read. `within` is the time that errors tell, `timeout` unless given; rank 0
    calls `meanwhile` while it waits. Raises `DeadlineError` naming the ranks that did not come.
    """
    within = timeout if within is None else within
    if rank == 0:
        return _receive(store, world_size, timeout, within, prefix, background, meanwhile)
    deadline = time.monotonic() + timeout
    own = secrets.token_hex(16)
    hello, welcome = f"{prefix}/hello/{rank}", f"{prefix}/welcome/{own}"
    store.set(hello, own.encode())
    session = store.get(welcome, timeout + grace(timeout))
    if session is None:
        raise DeadlineError(f"connecting: rank 0 did not arrive within {within:g} s")
    store.delete(welcome)
    communicator = StoreCommunicator(store, rank, world_size, f"{prefix}/{session.decode()}", background)
    communicator.rendezvous(max(0.0, deadline - time.monotonic()), within)
    return communicator


def _receive(
    store: KeyValueStore,
    world_size: int,
    timeout: float,
    within: float,
    prefix: str,
    background: KeyValueStore | None,
    meanwhile: Callable[[], None],
) -> StoreCommunicator:
    deadline = time.monotonic() + timeout
    session = secrets.token_hex(8)
    communicator = StoreCommunicator(store, 0, world_size, f"{prefix}/{session}", background)
    answered: dict[int, bytes | None] = dict.fromkeys(range(1, world_size))
    pause = 0.001
    while answered and time.monotonic() < deadline:
        meanwhile()
        hellos = dict(zip(answered, store.get_each([f"{prefix}/hello/{rank}" for rank in answered]), strict=True))
        new = {rank: hello for rank, hello in hellos.items() if hello is not None and hello != answered[rank]}
        store.set_each({f"{prefix}/welcome/{hello.decode()}": session.encode() for hello in new.values()})
        answered |= new
        for rank in communicator.all_entered(0, [rank for rank in answered if rank not in new]):
            del answered[rank]
        if answered:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    communicator.rendezvous(max(0.0, deadline - time.monotonic()), within)
    store.delete_each([f"{prefix}/hello/{rank}" for rank in range(1, world_size)])
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
