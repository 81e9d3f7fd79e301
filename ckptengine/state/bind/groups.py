"""An optimizer's saved groups as the groups that are here: each takes over what was saved for its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.schema.path import Path
from ckptengine.state.own_state import GROUPS
from ckptengine.state.saved import Node, SavedValue
from ckptengine.state.union import NAMED
from ckptengine.state.values import digest, encode

__all__ = ["Regrouped", "regroup", "saved_groups"]

_PARAMS, _GIVEN = NAMED


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Why the groups don't fit, None where they do; and what of them belongs to no group here, by path from theirs.
    `taken` are the parameters, by their saved names, that groups here have; None where all are left to be compared."""

    reason: str | None = None
    dropped: tuple[tuple[Path, Node], ...] = ()
    taken: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One saved group: its parameters, the names that the user gave them, its other values, and its number, under which
    it is a node where these are nodes of their own."""

    params: list[Any]
    given: list[Any] | None
    others: Mapping[str, Any]
    number: int


def regroup(optimizer: Node, names: Sequence[Sequence[str]], name_of: Callable[[str], str], apart: bool) -> Regrouped:
    """Make of an optimizer's saved groups, in place, the groups of the parameters `names`.

    `name_of` leads from a saved name to that here. Nothing is done where the groups have the same parameters as those
    here, or other groupings are not expected: that takes `apart`, several ranks of which each may have some of the
    parameters, or groups that several ranks had saved their parts of.
    """
    place = optimizer.child(GROUPS)
    saved = None if place is None else saved_groups(place)
    if place is None or not saved or not (apart or place.joined):
        return Regrouped()
    there = [[name_of(str(name)) for name in group.params] for group in saved]
    if list(map(set, there)) == list(map(set, names)):
        return Regrouped()
    if not place.joined and {n for group in there for n in group} == {n for group in names for n in group}:
        return Regrouped()  # all of it is here, in other groups than it was
    found_in: dict[str, list[int]] = {}
    for number, group in enumerate(there):
        for name in group:
            found_in.setdefault(name, []).append(number)
    made: list[Group] = []
    taken: set[int] = set()
    for number, own in enumerate(names):
        unknown = sorted(name for name in own if name not in found_in)
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            return Regrouped(
                f"group {number} has parameters that are in no group of the checkpoint: {', '.join(unknown[:8])}{more}"
            )
        sources = list(dict.fromkeys(place for name in own for place in found_in[name]))
        sources = sources or [min(number, len(saved) - 1)]  # a group without parameters: that in its place
        reason = _differing(number, [saved[source] for source in sources], [there[source] for source in sources], own)
        if reason is not None:
            return Regrouped(reason)
        taken.update(sources)
        made.append(_made(own, [saved[source] for source in sources], name_of))
    dropped = [
        (((number, *path)), node)
        for number in range(len(saved))
        if number not in taken and number in place.children
        for path, node in place.children[number].leaves()
    ]
    _put(place, made)
    here = {name for group in names for name in group}
    mine = frozenset(str(name) for group in saved for name in group.params if name_of(str(name)) in here)
    return Regrouped(None, tuple(dropped), mine)


def _made(own: Sequence[str], sources: Sequence[Group], name_of: Callable[[str], str]) -> Group:
    """Return the group of some parameters, under the names that the checkpoint has for them."""
    saved: dict[str, tuple[Any, Any]] = {}
    for group in sources:
        for number, name in enumerate(group.params):
            saved.setdefault(name_of(str(name)), (name, None if group.given is None else group.given[number]))
    params = [saved[name][0] for name in own]
    given = None if any(group.given is None for group in sources) else [saved[name][1] for name in own]
    return Group(params, given, sources[0].others, sources[0].number)


def _differing(number: int, sources: Sequence[Group], there: Sequence[Sequence[str]], own: Sequence[str]) -> str | None:
    """Return why groups of the checkpoint can't be one group here, None where they can."""
    first = sources[0]
    for group, names in zip(sources[1:], there[1:], strict=True):
        for key in sorted({*first.others, *group.others}):
            a, b = first.others.get(key), group.others.get(key)
            if isinstance(a, Node) or isinstance(b, Node):
                return (
                    f"group {number} is made of several groups of the checkpoint, whose {key!r} are tensors; make the "
                    "same groups as there were"
                )
            if digest(encode(a, ())) != digest(encode(b, ())):
                one, other = (next(name for name in some if name in set(own)) for some in (there[0], names))
                return (
                    f"group {number} can't have one {key!r}: in the checkpoint it is {a!r:.40} for {one} and "
                    f"{b!r:.40} for {other}; make groups as they were"
                )
    return None


def saved_groups(place: Node) -> list[Group] | None:
    """Return the saved groups, None where they have another form."""
    if isinstance(place.entry, SavedValue):
        found = place.entry.value if isinstance(place.entry.value, list) else []
        if not found or not all(isinstance(group, dict) and isinstance(group.get(_PARAMS), list) for group in found):
            return None
        return [
            Group(group[_PARAMS], _listed(group.get(_GIVEN)), _others(group), number)
            for number, group in enumerate(found)
        ]
    if sorted(place.children, key=str) != sorted(range(len(place.children)), key=str):
        return None
    result = []
    for number in range(len(place.children)):
        node = place.children[number]
        values: dict[str, Any] = {
            str(key): child.entry.value if isinstance(child.entry, SavedValue) else child
            for key, child in node.children.items()
        }
        if not isinstance(values.get(_PARAMS), list):
            return None
        result.append(Group(values[_PARAMS], _listed(values.get(_GIVEN)), _others(values), number))
    return result


def _listed(value: Any) -> list[Any] | None:
    return value if isinstance(value, list) else None


def _others(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in NAMED}


def _put(place: Node, groups: Sequence[Group]) -> None:
    if isinstance(place.entry, SavedValue):
        order = list(place.entry.value[0])
        values = []
        for group in groups:
            value = {_PARAMS: group.params, **group.others}
            if group.given is not None:
                value[_GIVEN] = group.given
            values.append({key: value[key] for key in sorted(value, key=lambda key: _place(order, key))})
        place.entry = SavedValue(values)
        return
    children: dict[Any, Node] = {}
    for number, group in enumerate(groups):
        saved = place.children[group.number]
        node = children[number] = copy.copy(saved)
        node.children = dict(saved.children)
        for key, names in ((_PARAMS, group.params), (_GIVEN, group.given)):
            if key in node.children and names is not None:
                child = node.children[key] = copy.copy(node.children[key])
                child.entry = SavedValue(names)
    place.children = children


def _place(order: Sequence[str], key: str) -> int:
    return order.index(key) if key in order else len(order)
