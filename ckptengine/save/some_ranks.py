"""What only some ranks have: whether it fits beside what the others have, and what is said of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Sequence, Set

import numpy as np

from ckptengine.errors import ReplicaMismatchError
from ckptengine.layout.survey import Survey
from ckptengine.save.values import stored_path
from ckptengine.schema.path import Path, dotted, path_order
from ckptengine.schema.ranks import name_ranks

__all__ = ["check_nesting", "objects_in_part", "objects_with_values_in_part", "on_some_ranks"]

_NAMED = 6
_KINDS_OF_RANKS = 64
"""As many different states as are compared with each other to see whether a rank has only less than another."""


def check_nesting(arrays: Set[Path], paths_of: Iterable[Sequence[Path]]) -> None:
    """Raise `ReplicaMismatchError` where one rank has a leaf at a path at which another has a container, or where one
    has an array and another a plain value; `arrays` are the paths of all arrays, `paths_of` those of plain values."""
    values = {stored_path(path) for paths in paths_of for path in paths}
    both = sorted(arrays & values, key=path_order)
    if both:
        raise ReplicaMismatchError(_different(both[0], "an array on one rank, a plain value on another"))
    for one, other in itertools.pairwise(sorted(arrays | values, key=path_order)):
        if other[: len(one)] == one:
            kind = "an array" if one in arrays else "a plain value (as an empty dict or list is)"
            raise ReplicaMismatchError(
                _different(one, f"{kind} on one rank, and on another a container in which {dotted(other)} lies")
            )


def _different(path: Path, what: str) -> str:
    return (
        f"{dotted(path)}: {what}. Give each a name of its own, or wrap what differs by rank in ckptengine.PerRank; "
        "leave out what is empty on some ranks only"
    )


def on_some_ranks(
    survey: Survey, paths_of: Sequence[Sequence[Path]], doc_of_rank: Sequence[int]
) -> tuple[int, str] | None:
    """Return at which level to log that only some ranks have some things, and the text; None where all have all.

    Where each rank has something that others lack, as pipeline stages do, that is no more than a note. Where a rank
    has only less than another one, that may be a mistake; but not where it is parameters' states in optimizers, of
    which FSDP1 and ZeRO leave each rank those of its own parameters.
    """
    documents_of: dict[Path, list[int]] = {}
    for number, paths in enumerate(paths_of):
        for path in {stored_path(path) for path in paths}:
            documents_of.setdefault(path, []).append(number)
    some: dict[tuple[int, ...], list[Path]] = {}
    having: dict[tuple[int, ...], tuple[int, ...]] = {}
    for path, numbers in documents_of.items():
        key = tuple(numbers)
        if key not in having:
            having[key] = tuple(np.flatnonzero(np.isin(doc_of_rank, numbers)).tolist())
        some.setdefault(having[key], []).append(path)
    of_groups = [tuple(group.holders.tolist()) for group in survey.groups]
    for head, number in survey.leaves:
        some.setdefault(of_groups[number], []).append(head.path)
    some = {ranks: paths for ranks, paths in some.items() if len(ranks) < survey.world_size}
    if not some:
        return None
    listed = sorted(some.items())
    text = "; ".join(
        f"{dotted(paths[0])}{f' and {len(paths) - 1:,} more' if len(paths) > 1 else ''} on {name_ranks(ranks)}"
        for ranks, paths in listed[:_NAMED]
    )
    more = f"; and {len(listed) - _NAMED} more such parts" if len(listed) > _NAMED else ""
    odd = [ranks for ranks, paths in some.items() if not all(map(_is_parameter_state, paths))]
    lacking = _lacking(odd, survey.world_size)
    if lacking is None:
        return logging.INFO, f"the ranks have different parts of the state, of which all is saved: {text}{more}"
    return logging.WARNING, (
        f"only some ranks have {text}{more}: it is saved. But {name_ranks([lacking])} has nothing that others lack, as "
        "a pipeline stage would: if it should have the same as they, give it the same state"
    )


def objects_in_part(
    objects: Iterable[Path], survey: Survey, paths_of: Sequence[Sequence[Path]], aliases_of: Sequence[Set[Path]]
) -> frozenset[Path]:
    """Return which of some objects have leaves that only some ranks have, given the paths of the plain values and the
    further names of tensors of all distinct ranks."""
    found = frozenset(objects)
    if not found:
        return found
    first = {path[:1] for path in found}  # most of a state lies under other keys
    some = {
        head.path
        for head, number in survey.leaves
        if head.path[:1] in first and survey.groups[number].holders.size < survey.world_size
    }
    for tables in (paths_of, aliases_of):
        some |= _on_some(tables, first)
    return _around(some, found)


def objects_with_values_in_part(objects: Iterable[Path], paths_of: Collection[Sequence[Path]]) -> frozenset[Path]:
    """Return which of some objects have plain values that only some ranks have."""
    found = frozenset(objects)
    return _around(_on_some(paths_of, {path[:1] for path in found}), found) if found else found


def _on_some(tables: Collection[Iterable[Path]], first: Set[Path]) -> set[Path]:
    sets: list[set[Path]] = [{path for path in paths if path[:1] in first} for paths in tables]
    return sets[0].union(*sets[1:]) - sets[0].intersection(*sets[1:]) if len(sets) > 1 else set()


def _around(paths: Iterable[Path], objects: frozenset[Path]) -> frozenset[Path]:
    return frozenset(path[:depth] for path in paths for depth in range(len(path) + 1) if path[:depth] in objects)


def _is_parameter_state(path: Path) -> bool:
    return len(path) > 2 and path[-3] == "state"


def _lacking(kinds: Iterable[Sequence[int]], world_size: int) -> int | None:
    """Return the first rank that has only less than another one, None where there is none, or too many to look."""
    parts: dict[int, set[int]] = {rank: set() for rank in range(world_size)}
    for number, ranks in enumerate(kinds):
        for rank in ranks:
            parts[rank].add(number)
    distinct: dict[frozenset[int], int] = {}
    for rank, has in parts.items():
        distinct.setdefault(frozenset(has), rank)
    if len(distinct) > _KINDS_OF_RANKS:
        return None
    less = [rank for has, rank in distinct.items() if any(has < other for other in distinct)]
    return min(less, default=None)
