"""Optimizers' states that were not saved by us as an optimizer: their parameters get the names that they have here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.schema.path import Key
from ckptengine.state.saved import Node, SavedValue

__all__ = ["adopt", "adopt_numbered"]


def adopt(node: Node, names: Sequence[Sequence[str]]) -> frozenset[str]:
    """Give the parameters of an optimizer's saved state, in place, the names that they have here; return these.

    `names` are those of each group here. `torch.optim.Optimizer.state_dict` has numbers in the place of names: they
    count in the order of the groups, as torch's own load takes them. `get_optimizer_state_dict` has a parameter's name
    within its module: it is the end of the name here. Where that does not tell one parameter for each, or the groups
    are others, nothing is changed, and the binding says what differs. That shapes agree is seen later.
    """
    groups = _groups(node)
    if groups is None or [len(params) for params in groups] != [len(own) for own in names]:
        return frozenset()
    there = [name for params in groups for name in params]
    here = [name for own in names for name in own]
    mapping = _by_number(there, here) if all(type(name) is int for name in there) else _by_end(there, here)
    if mapping is None or all(old == new for old, new in mapping.items()):
        return frozenset()
    state = node.child("state")
    if state is not None:
        renamed = {mapping.get(_as(key, there), key): child for key, child in state.children.items()}
        if len(renamed) != len(state.children):
            return frozenset()
        state.children = renamed
    _set_groups(node, [[mapping[name] for name in params] for params in groups])
    return frozenset(mapping.values())


def adopt_numbered(node: Node, names: Sequence[Sequence[str]], resized: bool) -> dict[str, str]:
    """Give the parameters of an optimizer that were saved as `<group>.<index>`, as those outside of modules were in
    older checkpoints, the names that they have here; return the old names by these.

    Where the groups have other numbers of parameters, nothing is changed; but where several ranks had parts of them,
    the numbers are those on each rank, and say nothing to another number of ranks.
    """
    groups = _groups(node)
    if groups is None or not all(isinstance(name, (int, str)) for params in groups for name in params):
        return {}
    if node.children["param_groups"].joined and not resized:
        placed = {name: name for params in groups for name in params}
    elif [len(params) for params in groups] == [len(own) for own in names]:
        placed = {f"{g}.{i}": name for g, params in enumerate(groups) for i, name in enumerate(params)}
    else:
        return {}
    there = {name for params in groups for name in params}
    mapping = {
        number: new
        for g, own in enumerate(names)
        for i, new in enumerate(own)
        if placed.get(number := f"{g}.{i}") == number != new and new not in there
    }
    state = node.child("state")
    if mapping and state is not None:
        state.children = {mapping.get(str(key), key): child for key, child in state.children.items()}
    if mapping:
        _set_groups(node, [[mapping.get(name, name) for name in params] for params in groups])
    return {new: old for old, new in mapping.items()}


def _by_number(there: list[Any], here: list[str]) -> dict[Any, str] | None:
    return dict(zip(there, here, strict=True)) if len(set(there)) == len(there) else None


def _by_end(there: list[Any], here: list[str]) -> dict[Any, str] | None:
    """Return the name here that each name is the end of; None where one is missing or meant twice."""
    ends: dict[str, list[str]] = {}
    for name in here:
        parts = name.split(".")
        for first in range(len(parts)):
            ends.setdefault(".".join(parts[first:]), []).append(name)
    found = {name: ends.get(name, []) if isinstance(name, str) else [] for name in there}
    if any(len(one) != 1 for one in found.values()) or len({one[0] for one in found.values()}) != len(here):
        return None
    return {name: one[0] for name, one in found.items()}


def _as(key: Key, there: list[Any]) -> Any:
    """Return a key of the state as the groups have it: DCP makes text of numbers."""
    numbers = bool(there) and type(there[0]) is int
    return int(key) if numbers and isinstance(key, str) and key.isdecimal() else key


def _groups(node: Node) -> list[list[Any]] | None:
    """Return the parameters of each saved group; None where they are not told."""
    place = node.child("param_groups")
    if place is None:
        return None
    if isinstance(place.entry, SavedValue):
        value = place.entry.value
        found = [group.get("params") if isinstance(group, Mapping) else None for group in _list(value)]
    else:
        if sorted(map(str, place.children)) != sorted(map(str, range(len(place.children)))):
            return None
        params = [place.children[key].child("params") for key in sorted(place.children, key=lambda key: int(key))]
        found = [one.entry.value if one is not None and isinstance(one.entry, SavedValue) else None for one in params]
    return found if found and all(isinstance(params, list) for params in found) else None  # type: ignore[return-value]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _set_groups(node: Node, groups: list[list[str]]) -> None:
    place = node.children["param_groups"]
    if isinstance(place.entry, SavedValue):
        value = [{**group, "params": params} for group, params in zip(place.entry.value, groups, strict=True)]
        place.entry = SavedValue(value)
        return
    for number, key in enumerate(sorted(place.children, key=lambda key: int(key))):
        place.children[key].children["params"].entry = SavedValue(groups[number])
