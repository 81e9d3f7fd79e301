"""All ranks succeed, or all raise."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TypeVar

from ckptengine import errors
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError

__all__ = [
    "agree",
    "all_and_words",
    "do_and_exchange",
    "first_and_words",
    "from_all",
    "from_first",
    "gather",
    "on_all",
    "share",
]

_T = TypeVar("_T")


def on_all(comm: Communicator, work: Callable[[], _T], timeout: float, doing: str) -> _T:
    """Do this rank's part of something, and return what came of it once no rank has an error; see `gather`."""
    return do_and_exchange(comm, lambda: (work(), b""), timeout, doing)[0]


def from_all(comm: Communicator, work: Callable[[], bytes], timeout: float, doing: str) -> list[bytes]:
    """Return what each rank's part of something gave, in the order of ranks; see `gather`."""
    return do_and_exchange(comm, lambda: (None, work()), timeout, doing)[1]


def do_and_exchange(
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
    value, error = _tried(work) if comm.rank == 0 else (b"", None)
    return share(comm, value, error, timeout, doing)


def first_and_words(
    comm: Communicator, work: Callable[[], bytes], word: bytes, timeout: float, doing: str
) -> tuple[Callable[[], bytes], list[bytes]]:
    """Do something on rank 0 and exchange a word of each rank, in one exchange.

    Return a function that gives rank 0's value or raises its error, and the words, so that a caller can compare what
    ranks ask for before it looks at the value. Words are as long on all ranks.
    """
    value, error = _tried(work) if comm.rank == 0 else (b"", None)
    reply = _reply(value, error) if comm.rank == 0 else b""
    words, replies = _with_words(comm, word, reply, error, timeout)
    return functools.partial(_outcome, replies[0], error, doing), words


def all_and_words(
    comm: Communicator, work: Callable[[], bytes], word: bytes, timeout: float, doing: str
) -> tuple[Callable[[], list[bytes]], list[bytes]]:
    """Do each rank's part of something and exchange a word of each, in one exchange.

    As `first_and_words`, but the function gives all ranks' values, or raises as `gather` does.
    """
    value, error = _tried(work)
    words, replies = _with_words(comm, word, _reply(value, error), error, timeout)
    return functools.partial(_outcomes, replies, error, doing), words


def agree(comm: Communicator, error: Exception | None, timeout: float, doing: str) -> None:
    """Return on all ranks where no rank has an error, else raise on all; see `gather`."""
    gather(comm, b"", error, timeout, doing)


def gather(comm: Communicator, value: bytes, error: Exception | None, timeout: float, doing: str) -> list[bytes]:
    """Return every rank's value where no rank has an error, else raise on all.

    Where all errors are of one class, the ranks that have one raise their own, and the others one of that class
    (where it is ckptengine's) that names the ranks and repeats their messages. Errors of several classes become a
    `RankFailedError` on all: what a caller does next must not differ between ranks. `doing` says what was being done.
    """
    return _outcomes(_all_gather(comm, _reply(value, error), error, timeout), error, doing)


def share(comm: Communicator, value: bytes, error: Exception | None, timeout: float, doing: str) -> bytes:
    """Return rank 0's value on all ranks, or raise rank 0's error on all; that of the others is not used."""
    if comm.world_size > 1:
        reply = comm.broadcast(_reply(value, error) if comm.rank == 0 else None, timeout)
        return _outcome(reply, error, doing)
    if error is not None:
        raise error
    return value


def _tried(work: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
    """Return what something gives, and its error."""
    try:
        return work(), None
    except Exception as error:
        return b"", error


def _with_words(
    comm: Communicator, word: bytes, reply: bytes, error: Exception | None, timeout: float
) -> tuple[list[bytes], list[bytes]]:
    """Exchange a word and a reply of each rank; `error` is this rank's own."""
    both = _all_gather(comm, word + reply, error, timeout)
    return [one[: len(word)] for one in both], [one[len(word) :] for one in both]


def _all_gather(comm: Communicator, own: bytes, error: Exception | None, timeout: float) -> list[bytes]:
    try:
        return [own] if comm.world_size == 1 else comm.all_gather(own, timeout)
    except DeadlineError as missing:
        # What this rank found may well be why others did not come.
        raise missing from error


def _outcomes(replies: list[bytes], error: Exception | None, doing: str) -> list[bytes]:
    """Return the values in all ranks' replies, or raise as `gather` does; `error` is this rank's own."""
    failed = {rank: json.loads(reply[1:]) for rank, reply in enumerate(replies) if reply[:1] == b"!"}
    if not failed:
        return [reply[1:] for reply in replies]
    kinds = {kind for kind, _ in failed.values()}
    if error is not None and len(kinds) == 1:
        raise error
    text = "; ".join(f"rank {rank}: {message.removeprefix(f'rank {rank}: ')}" for rank, (_, message) in failed.items())
    ranks = ", ".join(map(str, failed))
    raise _class(kinds.pop() if len(kinds) == 1 else "")(f"{doing} failed on rank(s) {ranks}: {text}") from error


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
