"""What all ranks have to ask for alike: digests travel with what is exchanged anyhow, words where these differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from ckptengine.comm.agree import all_and_words, first_and_words, from_all, from_first
from ckptengine.comm.base import Communicator
from ckptengine.schema.ranks import name_ranks

__all__ = ["all_alike", "first_alike", "in_words"]

_DIGEST_NBYTES = 8
_MOST_VALUES, _MOST_LETTERS = 4, 200


def first_alike(
    comm: Communicator,
    work: Callable[[], bytes],
    call: str,
    arguments: Mapping[str, object],
    timeout: float,
    doing: str,
) -> bytes:
    """Do `from_first` in a call that all ranks must make with the same arguments.

    Raises `ValueError`, the same on all ranks, where their arguments differ; `call` names the call in the message. The
    arguments are looked at before what rank 0 has found: it may have failed because of them.
    """
    if comm.world_size == 1:
        return from_first(comm, work, timeout, doing)
    outcome, digests = first_and_words(comm, work, _digest(arguments), timeout, doing)
    _check(comm, call, arguments, digests, timeout)
    return outcome()


def all_alike(
    comm: Communicator,
    work: Callable[[], bytes],
    call: str,
    arguments: Mapping[str, object],
    timeout: float,
    doing: str,
) -> list[bytes]:
    """Do `from_all` in a call that all ranks must make with the same arguments, as `first_alike` does `from_first`."""
    if comm.world_size == 1:
        return from_all(comm, work, timeout, doing)
    outcome, digests = all_and_words(comm, work, _digest(arguments), timeout, doing)
    _check(comm, call, arguments, digests, timeout)
    return outcome()


def _digest(arguments: Mapping[str, object]) -> bytes:
    """Return a digest of arguments by name, of which the values count as text."""
    return hashlib.sha256(_word(arguments)).digest()[:_DIGEST_NBYTES]


def _check(
    comm: Communicator, call: str, arguments: Mapping[str, object], digests: Sequence[bytes], timeout: float
) -> None:
    """Raise `ValueError`, the same on all ranks, where their arguments differ, which all see by the digests of all.

    The names of the arguments are the same on all ranks.
    """
    if len(set(digests)) < 2:
        return
    every = [json.loads(word) for word in comm.all_gather(_word(arguments), timeout)]
    for name in arguments:
        values = [one[name] for one in every]
        if len(set(values)) > 1:
            raise ValueError(f"{call}: {in_words(name, values)}")


def in_words(name: str, values: Iterable[object]) -> str:
    """Return which ranks have which value of an argument, and what to do; `values` are in the order of the ranks."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    shown = [f"{_short(value)} on {name_ranks(of)}" for value, of in list(ranks.items())[:_MOST_VALUES]]
    more = f", and {len(ranks) - _MOST_VALUES} more" if len(ranks) > _MOST_VALUES else ""
    return f"{name} is {', '.join(shown)}{more}. All ranks make this call together: give all the same"


def _word(arguments: Mapping[str, object]) -> bytes:
    return json.dumps({name: f"{value}" for name, value in arguments.items()}).encode()


def _short(value: object) -> str:
    text = f"{value}"
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"
