"""What the checkpoint has for an object beyond the state that it has here: other ranks' objects may have it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptengine.schema.path import Path
from ckptengine.state.forms import path_keys
from ckptengine.state.saved import Node

__all__ = ["Extra", "extras_of", "leave_out"]


@dataclass(frozen=True, slots=True)
class Extra:
    """Something that the checkpoint has in the state of the object at `path`, under `keys` there, and that the object
    does not have; `numbers` are those of its leaves, `has` those of the leaves that the object has."""

    path: Path
    keys: Path
    numbers: frozenset[int]
    has: frozenset[int] = frozenset()


def extras_of(path: Path, node: Node, current: Any) -> list[Extra]:
    """Return what a node has beyond an object's state, which is as it is before the load."""
    found = list(_look(path, (), node, current))
    has = frozenset(leaf.number for _, leaf in node.leaves()).difference(*(one.numbers for one in found))
    return [replace(one, has=has) for one in found]


def _look(path: Path, keys: Path, node: Node, current: Any) -> Iterator[Extra]:
    if not isinstance(current, Mapping) or (isinstance(node.container, Mapping) and "$dict" in node.container):
        return
    here = dict(zip(path_keys(current, (*path, *keys)), current.values(), strict=True))
    for key, child in node.children.items():
        if key in here:
            yield from _look(path, (*keys, key), child, here[key])
        else:
            yield Extra(path, (*keys, key), frozenset(leaf.number for _, leaf in child.leaves()))


def leave_out(rebuilt: Any, extras: Collection[Extra], taken: Collection[int]) -> None:
    """Take out of what an object is handed what other ranks' objects have: `taken` are numbers of leaves."""
    for extra in extras:
        if extra.numbers.isdisjoint(taken):
            continue
        *outer, last = extra.keys
        holder = rebuilt
        for key in outer:
            holder = holder[key]
        holder.pop(last, None)
