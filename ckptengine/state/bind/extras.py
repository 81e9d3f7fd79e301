"""Which items of an object a rank gets, where the ranks' objects have had different ones, or have them now."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Set
from dataclasses import dataclass, field
from typing import Any

from ckptengine.schema.path import Path
from ckptengine.state.forms import path_keys
from ckptengine.state.saved import Node

__all__ = ["Extra", "Items", "items_of", "leave_out"]


@dataclass(frozen=True, slots=True)
class Extra:
    """Something that an object is not to be handed, perhaps: under its `keys`, with the numbers of its leaves."""

    keys: Path
    numbers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Items:
    """What the checkpoint has for the object at `path`.

    `numbers` are those of all its leaves. `extras` is what the object does not have here before the load, `unsaved`
    what the object of this rank did not have when it was saved; None where the checkpoint does not say. `fresh` are the
    numbers of leaves that the object has here, and that this rank did not save; all where the rest of the state tells
    that this is no split as it was.
    """

    path: Path
    numbers: frozenset[int]
    extras: tuple[Extra, ...]
    unsaved: tuple[Extra, ...] | None = None
    fresh: frozenset[int] = field(default_factory=frozenset)


def items_of(path: Path, node: Node, current: Any, had: Set[Path] | None, alike: bool) -> Items:
    """Return what a node has for an object whose state is `current` before the load; `had` are the paths of the leaves
    that this rank saved of it, None where that is not known. `alike` tells that the ranks are split as they were, as
    far as the rest of the state says."""
    numbers = {where: leaf.number for where, leaf in node.leaves()}
    extras = tuple(_lacking((), node, current))
    if had is None:
        return Items(path, frozenset(numbers.values()), extras)
    mine = frozenset(where[len(path) :] for where in had)
    here = frozenset(numbers.values()).difference(*(one.numbers for one in extras))
    fresh = frozenset(
        number for where, number in numbers.items() if not alike or (number in here and where not in mine)
    )
    return Items(path, frozenset(numbers.values()), extras, tuple(_without((), node, mine)), fresh)


def _lacking(keys: Path, node: Node, current: Any) -> Iterator[Extra]:
    """Yield what a node has beyond what is there now."""
    if not isinstance(current, Mapping):
        return
    here = dict(zip(path_keys(current, keys), current.values(), strict=True))
    for key, child in node.children.items():
        if key in here:
            yield from _lacking((*keys, key), child, here[key])
        else:
            yield Extra((*keys, key), frozenset(leaf.number for _, leaf in child.leaves()))


def _without(keys: Path, node: Node, mine: Set[Path]) -> Iterator[Extra]:
    """Yield what a node has beyond some leaves."""
    for key, child in node.children.items():
        where = (*keys, key)
        inner = list(child.nodes(where))
        # What has neither an entry nor anything inside is a place for what each rank has of its own.
        kept = any((one.entry is not None and at in mine) or not (one.entry or one.children) for at, one in inner)
        if not kept:
            yield Extra(where, frozenset(one.number for _, one in inner if one.entry is not None))
        elif child.children:
            yield from _without(where, child, mine)


def leave_out(rebuilt: Any, of: Mapping[Path, list[Path]], path: Path) -> None:
    """Take out of what an object is handed what is not its own: `of` has the keys of that by the object's path."""
    # Backwards: the numbers of a list's items stay what they are.
    for keys in reversed(of.get(path, ())):
        _take_out(rebuilt, keys)


def _take_out(holder: Any, keys: Path) -> Any:
    """Take something out of a container; return the container that is to be in its place."""
    key, *rest = keys
    if isinstance(holder, MutableMapping):
        own = dict(zip(path_keys(holder, ()), holder, strict=True))[key]
        if rest:
            holder[own] = _take_out(holder[own], tuple(rest))
        else:
            del holder[own]
        return holder
    items = list(holder)
    assert isinstance(key, int)
    if rest:
        items[key] = _take_out(items[key], tuple(rest))
    else:
        del items[key]
    if isinstance(holder, (list, deque)):
        holder.clear()
        holder.extend(items)
        return holder
    return holder if hasattr(holder, "_fields") else tuple(items)
