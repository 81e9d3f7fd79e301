"""Who writes what: each rank finds its own part, from what all ranks hold; the parts fit together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckptengine.errors import StateError
from ckptengine.layout.balance import Run, balance, runs_of
from ckptengine.layout.grid import cells_of, padding_is_acceptable, regular_grid
from ckptengine.layout.holdings import Holding, same_holding
from ckptengine.layout.survey import Boxes, Group, Kind, Survey, by_path, even_part
from ckptengine.layout.tiling import Int64s, find_fault, inside, linear, tiles
from ckptengine.schema.head import LeafHead, LeafLayout, is_zero_sized, zero_sized_chunk
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import path_order
from ckptengine.schema.ranks import name_ranks

__all__ = ["Assigned", "assign", "assign_alone", "check_own"]

_SPLIT_NBYTES = 4 << 20  # boxes that several ranks hold are split from here on
_PIECE_NBYTES = 1 << 20  # and never into smaller pieces: archives align entries from this size on


@dataclass(frozen=True, slots=True)
class Assigned(LeafLayout):
    """One leaf that a rank holds, how it is stored, and the boxes of it that this rank writes.

    `offsets` and `lengths` are int64 [n, ndim], sorted by place in the leaf; n may be 0. `fragments` are the
    names of the boxes where `chunk_shape` is None, unique within the leaf over all ranks, else (). `writes`
    says whether the rank's archive carries the leaf: it has boxes, or the leaf has no elements and this is
    the lowest holder.
    """

    writes: bool
    offsets: Int64s = field(compare=False, repr=False)
    lengths: Int64s = field(compare=False, repr=False)
    fragments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the leaves of a group are stored: their pieces, sorted by place, and who writes each.

    `writers` are -1 where they are open: `runs` has these pieces. The leaves that are spread evenly have no pieces
    here, since each rank knows its own by arithmetic.
    """

    chunk_shape: tuple[int, ...] | None
    offsets: Int64s
    lengths: Int64s
    writers: Int64s
    runs: tuple[Run, ...]


def check_own(holdings: Sequence[Holding], rank: int) -> None:
    """Check what a rank can know alone of what it holds: boxes lie within their leaves, per-rank leaves are whole.

    Raises StateError naming leaf and rank. Done before the exchange, so that all ranks hear of it.
    """
    for holding in holdings:
        offsets, lengths = _sorted(holding, rank)
        if holding.placement is Placement.PER_RANK:
            _check_tiling(holding, offsets, lengths, [rank] * offsets.shape[0], np.asarray([rank]))


def assign(survey: Survey, boxes: Mapping[int, Boxes], rank: int, held: Sequence[Holding]) -> list[Assigned]:
    """Return what a rank writes, one `Assigned` for each leaf that it holds, sorted by path.

    `survey` and `boxes`, of the groups that tell theirs, are what all ranks hold; `held` is what this one does. All
    ranks' answers fit together. A box that one rank holds is written by it. Boxes that several hold are spread by
    bytes (`balance`); those of 4 MiB and more are split first where the leaf stays one regular grid. `WHOLE` leaves
    are written by their lowest holder, `PER_RANK` leaves by each rank for itself.

    Raises StateError, the same on all ranks, where boxes leave the leaf, overlap without being equal, or leave
    elements out.
    """
    plans = [_plan(number, group, boxes) for number, group in enumerate(survey.groups)]
    writers = [plans[number].writers for _, number in survey.leaves]
    shared = [place for place, (_, number) in enumerate(survey.leaves) if plans[number].runs]
    if shared:
        for place in shared:
            writers[place] = writers[place].copy()
        runs = [plans[survey.leaves[place][1]].runs for place in shared]
        balance(list(zip(runs, (writers[place] for place in shared), strict=True)), _settled(survey, plans))
    mine = {holding.path for holding in held}
    result = [_own(rank, holding) for holding in held if holding.placement is Placement.PER_RANK]
    for (head, number), of_leaf in zip(survey.leaves, writers, strict=True):
        if head.path in mine:
            result.append(_handed_out(head, survey.groups[number], plans[number], of_leaf, rank))
    return sorted(result, key=lambda leaf: path_order(leaf.path))


def assign_alone(
    previous: Sequence[Assigned], held_before: Sequence[Holding], held_now: Sequence[Holding], rank: int
) -> list[Assigned]:
    """Return what a rank writes when it alone knows that its structure changed, sorted by path.

    `previous` is this rank's part of the last common plan and `held_before` what it held then; `held_now` is
    what it holds. Leaves that it holds as before keep their assignment. New and changed ones are written
    whole by this rank, as fragments with names of its own, or as one grid where they are `PER_RANK`. Leaves
    that are gone are dropped. What the ranks' answers make together is for `merge` to check. Raises
    StateError as `assign`.
    """
    kept = {assigned.path: assigned for assigned in previous}
    before = {holding.path: holding for holding in held_before}
    result = []
    for holding in by_path(held_now, rank):
        old = before.get(holding.path)
        if old is not None and holding.path in kept and same_holding(old, holding):
            result.append(kept[holding.path])
        elif holding.placement is Placement.PER_RANK:
            result.append(_own(rank, holding))
        else:
            offsets, lengths = _sorted(holding, rank)
            chunk = zero_sized_chunk(holding.shape) if is_zero_sized(holding.shape) else None
            names = () if chunk is not None else tuple(f"r{rank}-{index}" for index in range(offsets.shape[0]))
            writes = chunk is not None or offsets.shape[0] > 0
            result.append(_assigned(holding, chunk, writes, offsets, lengths, names))
    return sorted(result, key=lambda leaf: path_order(leaf.path))


def _check_inside(head: LeafHead, offsets: Int64s, lengths: Int64s, ranks: Int64s) -> None:
    """Raise where a box is empty or leaves the shape; `ranks` has the holder of each box."""
    good = inside(head.shape, offsets, lengths)
    if not good.all():
        row = int(np.argmin(good))
        raise StateError(
            f"{head.name}: rank {ranks[row]} holds a box at {offsets[row].tolist()} with lengths "
            f"{lengths[row].tolist()}, which is empty or not within the global shape {head.shape}; check the "
            f"offset and the global shape that it was given"
        )


def _check_tiling(head: LeafHead, offsets: Int64s, lengths: Int64s, ranks: Sequence[int], holders: Int64s) -> None:
    """Raise where these distinct boxes overlap or leave elements out; `ranks` has one holder of each box."""
    if tiles(head.shape, offsets, lengths):
        return
    fault = find_fault(head.shape, offsets, lengths)
    if fault.rows:
        a, b = fault.rows[:2]
        raise StateError(
            f"{head.name}: the box {_box(offsets[a], lengths[a])} of rank {ranks[a]} and the box "
            f"{_box(offsets[b], lengths[b])} of rank {ranks[b]} overlap at {list(fault.element)} but are not "
            "equal; ranks must hold equal boxes or disjoint ones: check the offsets that they were given"
        )
    total = math.prod(head.shape)
    missing = max(1, total - sum(lengths.prod(axis=1).tolist()))
    raise StateError(
        f"{head.name}: {missing} of {total} elements of shape {head.shape} are held by no rank, for example "
        f"{list(fault.element)}; the leaf is in the state of {name_ranks(holders)}: all "
        "parts of a sharded leaf must be in the ranks' states"
    )


def _box(offset: Int64s, length: Int64s) -> str:
    return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(offset.tolist(), length.tolist(), strict=True)) + "]"


def _sorted(holding: Holding, rank: int) -> tuple[Int64s, Int64s]:
    """Return one rank's boxes by place in the leaf; raises where one is not inside."""
    _check_inside(holding, holding.offsets, holding.lengths, np.full(holding.offsets.shape[0], rank))
    order = np.argsort(linear(holding.shape, holding.offsets), kind="stable")
    return holding.offsets[order], holding.lengths[order]


def _own(rank: int, holding: Holding) -> Assigned:
    """Assign a per-rank leaf: the rank holds all of it and writes all of it."""
    offsets, lengths = _sorted(holding, rank)
    _check_tiling(holding, offsets, lengths, [rank] * offsets.shape[0], np.asarray([rank]))
    chunk = regular_grid(holding.shape, offsets, lengths, holding.itemsize)
    names = () if chunk is not None else tuple(map(str, range(offsets.shape[0])))
    return _assigned(holding, chunk, True, offsets, lengths, names)


def _plan(number: int, group: Group, told: Mapping[int, Boxes]) -> _Plan:
    """Plan the leaves of a group, given by their groups' numbers the boxes that ranks had to tell."""
    head, holders = group.head, group.holders
    if group.kind is Kind.EVEN:
        chunk = (-(-head.shape[0] // holders.size), *head.shape[1:])
        acceptable = padding_is_acceptable(head.shape, chunk, head.itemsize)
        nothing, no_box = np.zeros(0, np.int64), np.zeros((0, len(head.shape)), np.int64)
        return _Plan(chunk if acceptable else None, no_box, no_box, nothing, ())
    if group.kind is Kind.WHOLE:
        count = 0 if is_zero_sized(head.shape) else 1
        offsets = np.zeros((count, len(head.shape)), np.int64)
        lengths = np.asarray([head.shape] * count, np.int64).reshape(offsets.shape)
        ranks, bounds = holders, np.asarray([[0, holders.size]] * count, np.int64).reshape(count, 2)
    else:
        offsets, lengths, ranks, bounds = _distinct(head, told[number])
    cells = cells_of(head.shape, offsets, lengths)
    if cells is None:
        _check_tiling(head, offsets, lengths, ranks[bounds[:, 0]].tolist(), holders)
    elif offsets.shape[0] and head.placement is not Placement.WHOLE:
        cells, dim = _split(head, cells, int((bounds[:, 1] - bounds[:, 0]).min()))
        offsets, lengths, parents = _pieces(head.shape, offsets, lengths, cells, dim)
        bounds = bounds[parents]
    if cells is not None and not padding_is_acceptable(head.shape, cells, head.itemsize):
        cells = None
    alone = (bounds[:, 1] - bounds[:, 0] == 1) | (head.placement is Placement.WHOLE)
    writers = np.where(alone, ranks[bounds[:, 0]], -1)
    nbytes = lengths.prod(axis=1) * head.itemsize
    return _Plan(cells, offsets, lengths, writers, runs_of(nbytes, writers, ranks, bounds))


def _distinct(head: LeafHead, told: Boxes) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Return the distinct boxes by place, and the ranks that hold them: those of box i are from `bounds[i, 0]` on."""
    offsets, lengths, ranks = told.offsets, told.lengths, told.ranks
    _check_inside(head, offsets, lengths, ranks)
    first, last = linear(head.shape, offsets), linear(head.shape, offsets + lengths - 1)
    order = np.lexsort((ranks, last, first))
    # Within the shape, a box is known by its first and its last element.
    keys = np.stack([first[order], last[order], ranks[order]])
    fresh = np.ones(order.size, np.bool_)
    fresh[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)  # a rank's own duplicates count once
    order, keys = order[fresh], keys[:, fresh]
    new_box = np.ones(order.size, np.bool_)
    new_box[1:] = (keys[:2, 1:] != keys[:2, :-1]).any(axis=0)
    starts = np.flatnonzero(new_box)
    bounds = np.stack([starts, np.append(starts[1:], order.size)[: starts.size]], axis=1)
    offsets, lengths, ranks = offsets[order[starts]], lengths[order[starts]], ranks[order]
    return offsets, lengths, ranks, bounds


def _split(head: LeafHead, cells: tuple[int, ...], holders: int) -> tuple[tuple[int, ...], int]:
    """Return the chunk shape after splitting, and the dimension that is split (any, where nothing is)."""
    nbytes = math.prod(cells) * head.itemsize
    dim = next((d for d, length in enumerate(cells) if length > 1), None)
    if dim is None or nbytes < _SPLIT_NBYTES:
        return cells, 0
    whole = cells == head.shape
    for count in range(min(holders, nbytes // _PIECE_NBYTES, cells[dim]), 1, -1):
        if whole or cells[dim] % count == 0:
            finer = (*cells[:dim], -(-cells[dim] // count), *cells[dim + 1 :])
            if padding_is_acceptable(head.shape, finer, head.itemsize):
                return finer, dim
    return cells, 0


def _pieces(
    shape: Sequence[int], offsets: Int64s, lengths: Int64s, cells: tuple[int, ...], dim: int
) -> tuple[Int64s, Int64s, Int64s]:
    """Cut boxes into pieces of a chunk's length along one dimension; also returns the box of each piece."""
    if not cells:
        return offsets, lengths, np.arange(offsets.shape[0])
    step = cells[dim]
    counts = -(-lengths[:, dim] // step)
    parents = np.repeat(np.arange(offsets.shape[0]), counts)
    index = np.arange(parents.size) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets, lengths = offsets[parents], lengths[parents]
    offsets[:, dim] += index * step
    lengths[:, dim] = np.minimum(step, lengths[:, dim] - index * step)
    order = np.argsort(linear(shape, offsets), kind="stable")
    return offsets[order], lengths[order], parents[order]


def _settled(survey: Survey, plans: Sequence[_Plan]) -> Int64s:
    """Return the bytes that each rank writes of what no other rank could write, int64."""
    load = np.zeros(survey.world_size, np.int64)
    for group, plan in zip(survey.groups, plans, strict=True):
        head = group.head
        if group.kind is Kind.EVEN:
            step = -(-head.shape[0] // group.holders.size)
            starts = np.arange(group.holders.size, dtype=np.int64) * step
            rows = np.clip(head.shape[0] - starts, 0, step)
            load[group.holders] += rows * (math.prod(head.shape[1:]) * head.itemsize * group.count)
        else:
            settled = plan.writers >= 0
            nbytes = plan.lengths[settled].prod(axis=1) * (head.itemsize * group.count)
            np.add.at(load, plan.writers[settled], nbytes)
    return load


def _handed_out(head: LeafHead, group: Group, plan: _Plan, writers: Int64s, rank: int) -> Assigned:
    """Return a holder's part of one leaf."""
    if group.kind is Kind.EVEN:
        place = int(np.searchsorted(group.holders, rank))
        start, length = even_part(head.shape[0], place, group.holders.size)
        shape, rest = (int(length > 0), len(head.shape)), head.shape[1:]
        offsets = np.asarray([start, *(0 for _ in rest)] if length else [], np.int64).reshape(shape)
        lengths = np.asarray([length, *rest] if length else [], np.int64).reshape(shape)
        fragments = [str(rank)] if length and plan.chunk_shape is None else []
        return _assigned(head, plan.chunk_shape, length > 0, offsets, lengths, fragments)
    mine = np.flatnonzero(writers == rank)
    names = tuple(map(str, mine.tolist())) if plan.chunk_shape is None else ()
    writes = mine.size > 0 or (is_zero_sized(head.shape) and rank == int(group.holders[0]))
    return _assigned(head, plan.chunk_shape, writes, plan.offsets[mine], plan.lengths[mine], names)


def _assigned(
    head: LeafHead,
    chunk_shape: tuple[int, ...] | None,
    writes: bool,
    offsets: Int64s,
    lengths: Int64s,
    fragments: Iterable[str],
) -> Assigned:
    return Assigned(
        head.path,
        head.dtype,
        head.shape,
        head.placement,
        head.container,
        chunk_shape,
        writes,
        offsets,
        lengths,
        tuple(fragments),
    )
