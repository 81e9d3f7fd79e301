"""One state out of what several ranks have: outlines and optimizers' groups, joined, and what differs between them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ckptengine.errors import CheckpointDamagedError
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.state.outline import Container, Outline

__all__ = [
    "NAMED",
    "conflict_of",
    "hyperparameters",
    "join_groups",
    "join_outlines",
    "joined_names",
    "other_items",
    "other_outline",
]

NAMED = ("params", "param_names")
"""Where an optimizer's group has its parameters' names, and those that the user gave them: one after the other."""

_T = TypeVar("_T")


def join_outlines(outlines: Sequence[Outline]) -> Outline:
    """Return what is said in any of several outlines, of which the first counts where they differ in small things.

    A container's keys are in the order of the first one that lists them, those of the others where they have them. One
    whose keys are sorted lists none: what no other lists comes last.
    Raises `CheckpointDamagedError` naming a container that they have of different kinds or classes.
    """
    first, *rest = outlines
    if not rest:
        return first
    containers: dict[Path, list[Container]] = {path: list(found) for path, found in first.by_path.items()}
    for outline in rest:
        for path, found in outline.by_path.items():
            known = containers.setdefault(path, found)
            if known is not found:
                reason = conflict_of(known, found)
                if reason is not None:
                    raise CheckpointDamagedError(f"{dotted(path) or 'the state'}: {reason}")
                containers[path] = [_joined_keys(a, b) for a, b in zip(known, found, strict=True)]
    empty = [one.empty for one in outlines if one.empty is not None]
    return Outline(
        tuple(one for found in containers.values() for one in found),
        _first_of(one.orders for one in outlines),
        _first_of(one.shapes for one in outlines),
        _joined_metadata([one.metadata for one in outlines]),
        _first_of(one.spreads for one in outlines),
        tuple(dict.fromkeys(path for paths in empty for path in paths)) if empty else None,
        all(one.tells_metadata for one in outlines),
        _first_of(one.kinds for one in outlines),
        all(one.tells_kinds for one in outlines),
    )


def conflict_of(known: Sequence[Container], found: Sequence[Container]) -> str | None:
    """Return what two ranks have of different kinds or classes under one path, None where both have the same."""
    if [(one.kind, one.cls) for one in known] == [(one.kind, one.cls) for one in found]:
        return None
    here, there = (" of ".join(one.cls or one.kind for one in reversed(some)) for some in (known, found))
    return f"{here} on one rank, {there} on another"


def other_outline(outline: Outline, others: Sequence[Outline]) -> Outline:
    """Return what an outline says that none of others says."""
    known = {path: [one.by_path.get(path) for one in others] for path in outline.by_path}
    empty = {path for one in others for path in one.empty or ()}
    return Outline(
        tuple(one for path, found in outline.by_path.items() if found not in known[path] for one in found),
        other_items(outline.orders, [one.orders for one in others]),
        other_items(outline.shapes, [one.shapes for one in others]),
        other_items(outline.metadata, [one.metadata for one in others]),
        other_items(outline.spreads, [one.spreads for one in others]),
        None if outline.empty is None else tuple(path for path in outline.empty if path not in empty),
        kinds=other_items(outline.kinds, [one.kinds for one in others]),
    )


def other_items(items: Mapping[Path, _T], others: Sequence[Mapping[Path, _T]]) -> dict[Path, _T]:
    """Return the items of a mapping that none of others has."""
    return {path: value for path, value in items.items() if not any(path in o and o[path] == value for o in others)}


def join_groups(known: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return two ranks' groups of one optimizer, as typed JSON, as one list.

    Groups whose hyperparameters are all equal become one: the first of such groups here with the first there, and so
    on. A parameter is in two groups only where the ranks have given it different hyperparameters.
    """
    result: list[dict[str, Any]] = [dict(group) for group in known]
    names = {name for one in result for name in one["params"]}
    free: dict[str, list[int]] = {}
    for number, one in enumerate(result):
        free.setdefault(hyperparameters(one), []).append(number)
    for group in found:
        places = free.get(hyperparameters(group), [])
        if not places or any((name in result[places[0]]) != (name in group) for name in NAMED):
            result.append(dict(group))
            continue
        place = places.pop(0)
        result[place] = joined_names(result[place], group, names)
    return result


def hyperparameters(group: Mapping[str, Any]) -> str:
    """Return text that is equal for groups with equal hyperparameters."""
    return json.dumps({name: value for name, value in group.items() if name not in NAMED}, sort_keys=True)


def joined_names(group: Mapping[str, Any], other: Mapping[str, Any], known: Collection[Any]) -> dict[str, Any]:
    """Return a group with the parameters of another one behind its own, those that are `known` excepted."""
    new = [number for number, name in enumerate(other["params"]) if name not in known]
    return {**group, **{name: [*group[name], *(other[name][n] for n in new)] for name in NAMED if name in group}}


def _joined_keys(one: Container, other: Container) -> Container:
    if one.keys == other.keys:
        return one
    return Container(one.path, one.kind, one.cls, _in_both_orders(one.keys or (), other.keys or ()))


def _in_both_orders(one: Sequence[Key], other: Sequence[Key]) -> tuple[Key, ...]:
    """Return the keys of both, in the order of the first; what the other adds comes before what it has next."""
    before: dict[Key, list[Key]] = {}
    waiting: list[Key] = []
    known = set(one)
    for key in other:
        if key in known:
            before.setdefault(key, []).extend(waiting)
            waiting = []
        else:
            waiting.append(key)
    return (*(each for key in one for each in (*before.get(key, ()), key)), *waiting)


def _first_of(mappings: Iterable[Mapping[Path, _T]]) -> dict[Path, _T]:
    result: dict[Path, _T] = {}
    for one in mappings:
        result = {**one, **result}
    return result


def _joined_metadata(found: Sequence[Mapping[Path, Any]]) -> dict[Path, Any]:
    """Return the `_metadata` of each ordered dict: that of all modules which any rank has in it."""
    result: dict[Path, Any] = {}
    for one in found:
        for path, value in one.items():
            known = result.get(path)
            if isinstance(known, dict) and isinstance(value, dict):
                joined = type(known)(known)
                joined.update({name: item for name, item in value.items() if name not in known})
                result[path] = joined
            else:
                result.setdefault(path, value)
    return result
