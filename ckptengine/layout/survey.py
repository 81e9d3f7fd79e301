"""What all ranks hold, from as little as they need to tell each other.

A rank's *table* lists its leaves and says of each how it is spread, in words that are the same on all ranks of the
usual shardings, so that most ranks have equal tables and exchange no more than a digest of them. Leaves of which all
ranks say the same make a *group*: its ranks' boxes are told once, for one of its leaves, and not at all where they
follow from the word.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache

import numpy as np

from ckptengine.errors import SaveFailedError, StateError
from ckptengine.layout.holdings import Holding
from ckptengine.layout.packing import pack, parse_json, unpack
from ckptengine.layout.tiling import Int64s
from ckptengine.schema.head import LeafHead, head_from_json, head_to_json, is_zero_sized
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, path_order
from ckptengine.schema.ranks import name_ranks

__all__ = [
    "Boxes",
    "Group",
    "Kind",
    "Survey",
    "Table",
    "by_path",
    "decode_boxes",
    "encode_boxes",
    "even_part",
    "survey_of",
    "table_of",
]


class Kind(IntEnum):
    """How a leaf is spread."""

    EVEN = 0
    """Dimension 0 is cut by ceil-division into as many parts as there are ranks, in their order: `fully_shard`.

    In a table over all ranks, in a group over those that hold its leaves, such as those of a pipeline's stage."""
    WHOLE = 1
    """Every rank that has the leaf holds the whole of it."""
    BOXES = 2
    """In any other way: the ranks must tell their boxes. In a table, this and greater numbers: leaves of one shape
    of which the rank has the same boxes have the same number."""


_AS_EVEN = -1
"""In place of a number of boxes: the rank has its even part among the holders."""


@dataclass(frozen=True, slots=True)
class Table:
    """What a rank says of its leaves, sorted by path: their heads, and a number (see `Kind`, int64) for each."""

    heads: tuple[LeafHead, ...]
    kinds: Int64s = field(compare=False, repr=False)

    def encode(self) -> bytes:
        """Return the table as one message, the same for the same leaves spread in the same way."""
        return pack([head_to_json(head) for head in self.heads], [self.kinds])

    @classmethod
    def decode(cls, message: bytes) -> Table:
        """Return the table that `encode` was called on; raises SaveFailedError where the message is damaged."""
        try:
            json_part, (kinds,) = unpack(message, columns=1)
            heads = _heads(json_part)
            if kinds.size != len(heads) or (kinds < 0).any():
                raise ValueError("its kinds don't fit its leaves")
        except ValueError as error:
            raise _damaged(error) from error
        return cls(heads, kinds)


@dataclass(frozen=True, slots=True)
class Group:
    """Leaves of one shape, dtype and placement that are spread in the same way; `head` is that of the first.

    `holders` are the ranks that have them in their state, int64, ascending; `count` is the number of leaves.
    """

    head: LeafHead
    kind: Kind
    holders: Int64s = field(compare=False, repr=False)
    count: int


@dataclass(frozen=True, slots=True)
class Survey:
    """All shared leaves of all ranks, sorted by path, each with the number of its group."""

    world_size: int
    leaves: tuple[tuple[LeafHead, int], ...]
    groups: tuple[Group, ...]

    @property
    def told(self) -> list[int]:
        """The groups whose boxes the ranks must tell."""
        return [number for number, group in enumerate(self.groups) if group.kind is Kind.BOXES]


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes of a group's leaves on all ranks: int64 [n, ndim], and the rank that holds each."""

    offsets: Int64s
    lengths: Int64s
    ranks: Int64s


def by_path(holdings: Sequence[Holding], rank: int) -> list[Holding]:
    """Return a rank's holdings sorted by path; raises StateError where two have the same."""
    result = sorted(holdings, key=lambda holding: path_order(holding.path))
    for before, holding in itertools.pairwise(result):
        if before.path == holding.path:
            raise StateError(f"{holding.name}: rank {rank} holds two leaves under this key; give each its own key")
    return result


def even_part(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return start and length of a rank's part of a dimension that is cut evenly; the last may be short or empty."""
    step = -(-length // world_size)
    start = min(rank * step, length)
    return start, min(step, length - start)


def table_of(holdings: Sequence[Holding], rank: int, world_size: int) -> Table:
    """Return what a rank says of what it holds, given by path."""
    heads = []
    kinds = np.zeros(len(holdings), np.int64)
    numbers: dict[tuple[tuple[int, ...], bytes, bytes], int] = {}
    for place, holding in enumerate(holdings):
        heads.append(LeafHead(holding.path, holding.dtype, holding.shape, holding.placement, holding.container))
        if _is_even(holding, rank, world_size):
            kinds[place] = Kind.EVEN
        elif _is_whole(holding):
            kinds[place] = Kind.WHOLE
        else:
            key = (holding.shape, holding.offsets.tobytes(), holding.lengths.tobytes())
            kinds[place] = numbers.setdefault(key, Kind.BOXES + len(numbers))
    return Table(tuple(heads), kinds)


def survey_of(tables: Sequence[Table], table_of_rank: Int64s) -> Survey:
    """Return what all ranks hold, from the distinct tables and the number of each rank's (int64, one per rank).

    Raises StateError, naming leaf and ranks, where the ranks disagree about a leaf.
    """
    ranks_of = [np.flatnonzero(table_of_rank == number) for number in range(len(tables))]
    said: dict[Path, list[tuple[int, int]]] = {}
    for number, table in enumerate(tables):
        for place, head in enumerate(table.heads):
            said.setdefault(head.path, []).append((number, place))
    kinds = [table.kinds.tolist() for table in tables]
    holders: dict[tuple[int, ...], Int64s] = {}
    numbers: dict[tuple[object, ...], int] = {}
    groups: list[Group] = []
    counts: list[int] = []
    leaves = []
    for path in sorted(said, key=path_order):
        in_tables = said[path]
        heads = [tables[number].heads[place] for number, place in in_tables]
        _check_agreement(heads, [ranks_of[number] for number, _ in in_tables])
        head = heads[0]
        if head.placement is Placement.PER_RANK:
            continue
        having = tuple(number for number, _ in in_tables)
        words = tuple(kinds[number][place] for number, place in in_tables)
        key = (head.shape, head.dtype, head.placement, having, words)
        if key not in numbers:
            numbers[key] = len(groups)
            if having not in holders:
                holders[having] = np.sort(np.concatenate([ranks_of[number] for number in having]))
            groups.append(Group(head, _kind(words, holders[having], table_of_rank.size), holders[having], 0))
            counts.append(0)
        counts[numbers[key]] += 1
        leaves.append((head, numbers[key]))
    counted = (Group(group.head, group.kind, group.holders, count) for group, count in zip(groups, counts, strict=True))
    return Survey(int(table_of_rank.size), tuple(leaves), tuple(counted))


def encode_boxes(survey: Survey, holdings: Sequence[Holding], rank: int) -> bytes:
    """Return what a rank tells of its boxes: those of one leaf of each group that must be told.

    Where they are its even part among the group's holders, -1 in place of their number says so.
    """
    mine = {holding.path: holding for holding in holdings}
    counts, told = [], []
    for number in survey.told:
        holders = survey.groups[number].holders
        holding = mine.get(survey.groups[number].head.path)
        if holding is None:
            counts.append(0)
        elif _is_even(holding, int(np.searchsorted(holders, rank)), holders.size):
            counts.append(_AS_EVEN)
        else:
            counts.append(holding.offsets.shape[0])
            told.append(holding)
    parts = [np.asarray(counts, np.int64)]
    for name in ("offsets", "lengths"):
        parts += [getattr(holding, name).reshape(-1) for holding in told]
    numbers = np.concatenate(parts)
    width = 4 if not numbers.size or -(1 << 31) <= int(numbers.min()) <= int(numbers.max()) < 1 << 31 else 8
    return bytes([width]) + numbers.astype(f"<i{width}").tobytes()


def decode_boxes(survey: Survey, messages: Sequence[bytes]) -> tuple[Survey, Mapping[int, Boxes]]:
    """Return what all ranks hold and the boxes of each group that told them, from each rank's message, in their order.

    A group of which all holders have their even part is `EVEN` then, and has no boxes. Raises SaveFailedError where a
    message is damaged. Whether the boxes make sense is for `assign`.
    """
    told = survey.told
    ndims = np.asarray([len(survey.groups[number].head.shape) for number in told], np.int64)
    try:
        numbers = [_numbers(message) for message in messages]
        sizes = np.asarray([rank_numbers.size for rank_numbers in numbers], np.int64)
        if (sizes < len(told)).any():
            raise ValueError("it is cut short")
        words = np.stack([rank_numbers[: len(told)] for rank_numbers in numbers]).astype(np.int64)
        if (words < _AS_EVEN).any() or (words > sizes[:, None]).any():
            raise ValueError("its counts don't fit its boxes")
        counts = np.maximum(words, 0)
        if (counts[:, ndims == 0] > 1).any() or (len(told) + 2 * counts @ ndims != sizes).any():
            raise ValueError("its counts don't fit its boxes")
        speaking = np.count_nonzero(words, axis=0).tolist()
        even = [_even_holders(survey.groups[n], words[:, place], speaking[place]) for place, n in enumerate(told)]
    except ValueError as error:
        raise _damaged(error) from error
    flat = np.concatenate(numbers).astype(np.int64, copy=False)
    taken = counts * ndims
    offsets_at = (np.cumsum(sizes) - sizes + len(told))[:, None] + np.cumsum(taken, axis=1) - taken
    all_taken = taken.sum(axis=1)
    groups, result = list(survey.groups), {}
    for place, number in enumerate(told):
        group = groups[number]
        holders = group.holders
        if even[place].size == holders.size:
            groups[number] = replace(group, kind=Kind.EVEN)
            continue
        count = counts[holders, place]
        shape = (-1, int(ndims[place])) if ndims[place] else (int(count.sum()), 0)
        at, size = offsets_at[holders, place], taken[holders, place]
        offsets = flat[_stretches(at, size)].reshape(shape)
        lengths = flat[_stretches(at + all_taken[holders], size)].reshape(shape)
        boxes = Boxes(offsets, lengths, np.repeat(holders, count))
        result[number] = _with_even(boxes, group, even[place]) if even[place].size else boxes
    return replace(survey, groups=tuple(groups)), result


def _even_holders(group: Group, words: Int64s, speaking: int) -> Int64s:
    """Return the ranks that have said that they have their even part, of `speaking` that have said anything.

    Raises where one can't have said that.
    """
    head, holders = group.head, group.holders
    of_holders = words[holders]
    if np.count_nonzero(of_holders) != speaking:
        raise ValueError("it tells boxes of a leaf that its rank does not have")
    said: Int64s = holders[of_holders == _AS_EVEN]
    if said.size and (head.placement is not Placement.SHARDED or not head.shape or is_zero_sized(head.shape)):
        raise ValueError("it says of a leaf that is not cut how it is cut")
    return said


def _with_even(boxes: Boxes, group: Group, ranks: Int64s) -> Boxes:
    """Return boxes with those of the ranks that have their even part, where others have something else."""
    length, rest = group.head.shape[0], group.head.shape[1:]
    places = np.searchsorted(group.holders, ranks).tolist()
    parts = [even_part(length, place, group.holders.size) for place in places]
    some = [number for number, (_, rows) in enumerate(parts) if rows]
    offsets = np.zeros((len(some), 1 + len(rest)), np.int64)
    lengths = np.zeros_like(offsets)
    lengths[:, 1:] = rest
    for row, number in enumerate(some):
        offsets[row, 0], lengths[row, 0] = parts[number]
    order = np.argsort(np.concatenate([boxes.ranks, ranks[some]]), kind="stable")
    return Boxes(
        np.concatenate([boxes.offsets, offsets])[order],
        np.concatenate([boxes.lengths, lengths])[order],
        np.concatenate([boxes.ranks, ranks[some]])[order],
    )


def _is_even(holding: Holding, rank: int, world_size: int) -> bool:
    if holding.placement is not Placement.SHARDED or not holding.shape or is_zero_sized(holding.shape):
        return False
    start, length = even_part(holding.shape[0], rank, world_size)
    if not length:
        return not holding.offsets.shape[0]
    rest = holding.shape[1:]
    return _is_box(holding, [start, *(0 for _ in rest)], [length, *rest])


def _is_whole(holding: Holding) -> bool:
    if is_zero_sized(holding.shape):
        return not holding.offsets.shape[0]
    return _is_box(holding, [0] * len(holding.shape), list(holding.shape))


def _is_box(holding: Holding, offset: list[int], lengths: list[int]) -> bool:
    return bool(holding.lengths.tolist() == [lengths] and holding.offsets.tolist() == [offset])


def _kind(words: Sequence[int], holders: Int64s, world_size: int) -> Kind:
    if all(word == Kind.EVEN for word in words) and holders.size == world_size:
        return Kind.EVEN
    return Kind.WHOLE if all(word == Kind.WHOLE for word in words) else Kind.BOXES


def _check_agreement(heads: Sequence[LeafHead], ranks: Sequence[Int64s]) -> None:
    """Raise where tables say different things of a leaf; `ranks` have each table."""
    first = heads[0]
    per_rank = first.placement is Placement.PER_RANK

    def said(head: LeafHead) -> tuple[object, ...]:
        kept_apart = per_rank and head.placement is Placement.PER_RANK
        return (head.placement,) if kept_apart else (head.placement, head.dtype, head.shape)

    expected = said(first)
    other = next((head for head in heads if said(head) != expected), None)
    if other is None:
        return
    agreeing, differing = (
        np.concatenate([of_table for head, of_table in zip(heads, ranks, strict=True) if said(head) == said(one)])
        for one in (first, other)
    )
    raise StateError(
        f"{first.name}: {first.placement.value} {first.dtype} of shape {first.shape} on "
        f"{name_ranks(agreeing)}, but {other.placement.value} {other.dtype} of shape {other.shape} on "
        f"{name_ranks(differing)}; all ranks must have the same. If each rank has a part of a larger "
        "array, pass a DTensor, or say how it is split with ckptengine.Sharded; where each has its own, "
        "wrap it in ckptengine.PerRank"
    )


def _numbers(message: bytes) -> Int64s:
    width = message[0] if message else 0
    if width not in (4, 8) or (len(message) - 1) % width:
        raise ValueError("it is no list of boxes")
    return np.frombuffer(message, f"<i{width}", offset=1)


def _stretches(starts: Int64s, sizes: Int64s) -> Int64s:
    """Return the indices of consecutive stretches: `starts[i]`, …, `starts[i] + sizes[i] - 1` for each i."""
    shift = starts - (np.cumsum(sizes) - sizes)
    return np.repeat(shift, sizes) + np.arange(int(sizes.sum()))


def _damaged(error: ValueError) -> SaveFailedError:
    return SaveFailedError(f"a rank's planning message is damaged ({error}); nothing was written, save again")


# Most ranks send the same table; the stages of a pipeline send some tens of them.
@lru_cache(maxsize=64)
def _heads(json_part: bytes) -> tuple[LeafHead, ...]:
    table = parse_json(json_part)
    if not isinstance(table, list):
        raise ValueError("its leaf table is no list")
    return tuple(map(head_from_json, table))
