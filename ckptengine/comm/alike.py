"""What all ranks have to ask for alike; it travels with what they exchange anyhow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from ckptengine.schema.ranks import name_ranks

__all__ = ["asked_word", "check_alike", "differing"]

_MOST_VALUES, _MOST_LETTERS = 4, 200


def asked_word(asked: Mapping[str, object]) -> bytes:
    """Return what a rank asks for, by the names of arguments, as a word for the others: values as text."""
    return json.dumps({name: f"{value}" for name, value in asked.items()}).encode()


def check_alike(call: str, words: Sequence[bytes]) -> None:
    """Raise `ValueError`, the same on all ranks, where what they ask for (`asked_word`) differs in an argument."""
    if len(set(words)) < 2:
        return
    every = [json.loads(word) for word in words]
    for name in dict.fromkeys(name for one in every for name in one):
        values = [one.get(name) for one in every]
        if len(set(values)) > 1:
            raise ValueError(f"{call}: {differing(name, values)}. All ranks make this call together: give all the same")


def differing(name: str, values: Iterable[object]) -> str:
    """Return in words which ranks have which value of an argument; `values` are in the order of the ranks."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    shown = [f"{_short(value)} on {name_ranks(of)}" for value, of in list(ranks.items())[:_MOST_VALUES]]
    more = f", and {len(ranks) - _MOST_VALUES} more" if len(ranks) > _MOST_VALUES else ""
    return f"{name} is {', '.join(shown)}{more}"


def _short(value: object) -> str:
    text = f"{value}"
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"
