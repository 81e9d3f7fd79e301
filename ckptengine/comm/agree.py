"""All ranks succeed, or all raise."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TypeVar

from ckptengine import errors
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError

__all__ = ["agree", "exchange", "first_and_words", "from_all", "from_first", "gather", "on_all", "share"]

_T = TypeVar("_T")
_SIZE_NBYTES = 4


def on_all(comm: Communicator, work: Callable[[], _T], timeout: float, doing: str) -> _T:
    """Do this rank's part of something, and return what came of it once no rank has an error; see `gather`."""
    return exchange(comm, lambda: (work(), b""), timeout, doing)[0]


def from_all(comm: Communicator, work: Callable[[], bytes], timeout: float, doing: str) -> list[bytes]:
    """Return what each rank's part of something gave, in the order of ranks; see `gather`."""
    return exchange(comm, lambda: (None, work()), timeout, doing)[1]


def exchange(
    comm: Communicator, work: Callable[[], tuple[_T, bytes]], timeout: float, doing: str
) -> tuple[_T, list[bytes]]:
    """Do this rank's part of something that ends with a word for all ranks; return what came of it, and all ranks'
    words in the order of ranks, once no rank has an error; see `gather`."""
    try:
        result, word = work()
    except Exception as error:
        gather(comm, b"", error, timeout, doing)
        raise
    return result, gather(comm, word, None, timeout, doing)


def from_first(comm: Communicator, work: Callable[[], bytes], timeout: float, doing: str) -> bytes:
    """Do something on rank 0, and return on all ranks what it gave, or raise its error on all."""
    value, error = b"", None
    try:
        value = work() if comm.rank == 0 else b""
    except Exception as problem:
        error = problem
    return share(comm, value, error, timeout, doing)


def first_and_words(
    comm: Communicator, work: Callable[[], bytes], word: bytes, timeout: float, doing: str
) -> tuple[Callable[[], bytes], list[bytes]]:
    """Do something on rank 0, and return what gives its value or raises its error, as `from_first` does, with a word of
    each rank, in one exchange: what ranks ask for can be compared before it is looked at what rank 0 has found."""
    value, error = b"", None
    try:
        value = work() if comm.rank == 0 else b""
    except Exception as problem:
        error = problem
    reply = _reply(value, error)
    if comm.world_size == 1:
        return functools.partial(_outcome, reply, error, doing), [word]
    size = len(word).to_bytes(_SIZE_NBYTES, "little")
    replies = comm.all_gather(size + word + (reply if comm.rank == 0 else b""), timeout)
    words = []
    for number, one in enumerate(replies):
        end = _SIZE_NBYTES + int.from_bytes(one[:_SIZE_NBYTES], "little")
        words.append(one[_SIZE_NBYTES:end])
        reply = one[end:] if number == 0 else reply
    return functools.partial(_outcome, reply, error, doing), words


def agree(comm: Communicator, error: Exception | None, timeout: float, doing: str) -> None:
    """Return on all ranks where no rank has an error, else raise on all; see `gather`."""
    gather(comm, b"", error, timeout, doing)


def gather(comm: Communicator, value: bytes, error: Exception | None, timeout: float, doing: str) -> list[bytes]:
    """Return every rank's value where no rank has an error, else raise on all.

    Where all errors are of one class, the ranks that have one raise their own, and the others one of that class
    (where it is ckptengine's) that names the ranks and repeats their messages. Errors of several classes become a
    `RankFailedError` on all: what a caller does next must not differ between ranks. `doing` says what was being done.
    """
    own = _reply(value, error)
    try:
        replies = [own] if comm.world_size == 1 else comm.all_gather(own, timeout)
    except DeadlineError as missing:
        # What this rank found may well be why others did not come.
        raise missing from error
    failed = {rank: json.loads(reply[1:]) for rank, reply in enumerate(replies) if reply[:1] == b"!"}
    if not failed:
        return [reply[1:] for reply in replies]
    kinds = {kind for kind, _ in failed.values()}
    if error is not None and len(kinds) == 1:
        raise error
    text = "; ".join(f"rank {rank}: {message.removeprefix(f'rank {rank}: ')}" for rank, (_, message) in failed.items())
    ranks = ", ".join(map(str, failed))
    raise _class(kinds.pop() if len(kinds) == 1 else "")(f"{doing} failed on rank(s) {ranks}: {text}") from error


def share(comm: Communicator, value: bytes, error: Exception | None, timeout: float, doing: str) -> bytes:
    """Return rank 0's value on all ranks, or raise rank 0's error on all; that of the others is not used."""
    if comm.world_size > 1:
        reply = comm.broadcast(_reply(value, error) if comm.rank == 0 else None, timeout)
        return _outcome(reply, error, doing)
    if error is not None:
        raise error
    return value


def _outcome(reply: bytes, error: Exception | None, doing: str) -> bytes:
    """Return the value in rank 0's reply, or raise its error; `error` is this rank's own."""
    if error is not None:
        raise error
    if reply[:1] == b"!":
        kind, message = json.loads(reply[1:])
        raise _class(kind)(f"{doing} failed on rank 0: {message}")
    return reply[1:]


def _reply(value: bytes, error: Exception | None) -> bytes:
    return b"=" + value if error is None else b"!" + _pack(error)


def _pack(error: Exception) -> bytes:
    return json.dumps([type(error).__name__, f"{error}" or type(error).__name__]).encode()


def _class(name: str) -> type[CheckpointError]:
    return getattr(errors, name, RankFailedError) if name in errors.__all__ else RankFailedError
