"""Who writes what: the same answer on every rank, from what all ranks hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckptengine.comm.ranks import name_ranks
from ckptengine.errors import StateError
from ckptengine.layout.grid import cells_of, padding_is_acceptable, regular_grid
from ckptengine.layout.head import (
    LeafHead,
    LeafLayout,
    is_zero_sized,
    path_order,
    zero_sized_chunk,
)
from ckptengine.layout.holdings import Holding, same_holding
from ckptengine.layout.tiling import Int64s, find_fault, inside, linear, tiles
from ckptengine.state.leaf import Path, Placement

__all__ = ["Assigned", "assign", "assign_alone"]

_SPLIT_NBYTES = 4 << 20  # boxes that several ranks hold are split from here on
_PIECE_NBYTES = 1 << 20  # and never into smaller pieces: archives align entries from this size on

_Held = Sequence[tuple[int, Holding]]


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
    """One shared leaf: its pieces, sorted by place, and for each the ranks that hold it."""

    head: LeafHead
    holders: tuple[int, ...]
    chunk_shape: tuple[int, ...] | None
    offsets: Int64s
    lengths: Int64s
    ranks: Int64s  # the holders of piece i are ranks[bounds[2 * i] : bounds[2 * i + 1]], ascending
    bounds: Int64s
    writers: Int64s  # filled by _balance

    @property
    def nbytes(self) -> Int64s:
        result: Int64s = self.lengths.prod(axis=1) * self.head.itemsize
        return result


def assign(holdings: Sequence[Sequence[Holding]]) -> list[list[Assigned]]:
    """Return what each rank writes (index: rank), one `Assigned` for each leaf it holds, sorted by path.

    `holdings` is what each rank holds. A box that one rank holds is written by it. Boxes that several hold
    are spread by bytes, the largest first, each to the least loaded of its holders (Graham 1969, "Bounds on
    multiprocessing timing anomalies": at most 4/3 of the best possible); those of 4 MiB and more are split
    first where the leaf stays one regular grid. `WHOLE` leaves are written by their lowest holder, `PER_RANK`
    leaves by each rank for itself.

    Raises StateError where the ranks disagree about a leaf, or their boxes leave the leaf, overlap without
    being equal, or leave elements out.
    """
    result: list[list[Assigned]] = [[] for _ in holdings]
    plans = []
    for path, held in sorted(_by_path(enumerate(holdings)).items(), key=lambda item: path_order(item[0])):
        _check_agreement(path, held)
        if held[0][1].placement is Placement.PER_RANK:
            for rank, holding in held:
                result[rank].append(_own(rank, holding))
        else:
            plans.append(_plan(held))
    _balance(plans, len(holdings))
    for plan in plans:
        _hand_out(plan, result)
    for assigned in result:
        assigned.sort(key=lambda leaf: path_order(leaf.path))
    return result


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
    for path, held in _by_path([(rank, held_now)]).items():
        holding = held[0][1]
        old = before.get(path)
        if old is not None and path in kept and same_holding(old, holding):
            result.append(kept[path])
        elif holding.placement is Placement.PER_RANK:
            result.append(_own(rank, holding))
        else:
            offsets, lengths = _sorted(holding, rank)
            chunk = zero_sized_chunk(holding.shape) if is_zero_sized(holding.shape) else None
            names = () if chunk is not None else tuple(f"r{rank}-{index}" for index in range(offsets.shape[0]))
            writes = chunk is not None or offsets.shape[0] > 0
            result.append(_assigned(holding, chunk, writes, offsets, lengths, names))
    return sorted(result, key=lambda leaf: path_order(leaf.path))


def _by_path(holdings: Iterable[tuple[int, Sequence[Holding]]]) -> dict[Path, list[tuple[int, Holding]]]:
    result: dict[Path, list[tuple[int, Holding]]] = {}
    for rank, of_rank in holdings:
        for holding in of_rank:
            held = result.setdefault(holding.path, [])
            if held and held[-1][0] == rank:
                raise StateError(f"{holding.name}: rank {rank} holds two leaves under this key; give each its own key")
            held.append((rank, holding))
    return result


def _check_agreement(path: Path, held: _Held) -> None:
    first = held[0][1]
    per_rank = first.placement is Placement.PER_RANK

    def said(holding: Holding) -> tuple[str, ...]:
        kept_apart = per_rank and holding.placement is Placement.PER_RANK
        facts = (holding.placement.value,)
        return facts if kept_apart else (*facts, holding.dtype, str(holding.shape))

    expected = said(first)
    other = next((holding for _, holding in held if said(holding) != expected), None)
    if other is None:
        return
    agreeing = [rank for rank, holding in held if said(holding) == expected]
    differing = [rank for rank, holding in held if said(holding) == said(other)]
    raise StateError(
        f"{first.name}: {first.placement.value} {first.dtype} of shape {first.shape} on "
        f"{name_ranks(agreeing)}, but {other.placement.value} {other.dtype} of shape {other.shape} on "
        f"{name_ranks(differing)}; all ranks must have the same, or wrap the value in PerRank where each "
        "rank's own is wanted"
    )


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


def _check_tiling(head: LeafHead, offsets: Int64s, lengths: Int64s, ranks: Sequence[int], holders: _Held) -> None:
    """Raise where these distinct boxes overlap or leave elements out; `ranks` has one holder of each box."""
    if tiles(head.shape, offsets, lengths):
        return
    fault = find_fault(head.shape, offsets, lengths)
    assert fault is not None
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
        f"{list(fault.element)}; the leaf is in the state of {name_ranks(rank for rank, _ in holders)}: all "
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
    _check_tiling(holding, offsets, lengths, [rank] * offsets.shape[0], [(rank, holding)])
    chunk = regular_grid(holding.shape, offsets, lengths, holding.itemsize)
    names = () if chunk is not None else tuple(map(str, range(offsets.shape[0])))
    return _assigned(holding, chunk, True, offsets, lengths, names)


def _plan(held: _Held) -> _Plan:
    """Plan one shared leaf: distinct boxes, who holds them, how they are split; open writers are -1."""
    head = held[0][1]
    offsets = np.concatenate([holding.offsets for _, holding in held])
    lengths = np.concatenate([holding.lengths for _, holding in held])
    ranks = np.repeat([rank for rank, _ in held], [holding.offsets.shape[0] for _, holding in held])
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

    cells = cells_of(head.shape, offsets, lengths)
    if cells is None:
        _check_tiling(head, offsets, lengths, ranks[starts].tolist(), held)
    elif starts.size and head.placement is not Placement.WHOLE:
        holders = int((bounds[:, 1] - bounds[:, 0]).min())
        cells, dim = _split(head, cells, holders)
        offsets, lengths, parents = _pieces(head.shape, offsets, lengths, cells, dim)
        bounds = bounds[parents]
    if cells is not None and not padding_is_acceptable(head.shape, cells, head.itemsize):
        cells = None
    alone = (bounds[:, 1] - bounds[:, 0] == 1) | (head.placement is Placement.WHOLE)
    writers = np.where(alone, ranks[bounds[:, 0]], -1) if starts.size else np.zeros(0, np.int64)
    return _Plan(head, tuple(rank for rank, _ in held), cells, offsets, lengths, ranks, bounds.reshape(-1), writers)


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


def _balance(plans: Sequence[_Plan], world_size: int) -> None:
    """Choose the open writers, the largest piece first, each the least loaded of its holders."""
    load = np.zeros(world_size, np.int64)
    sizes = [plan.nbytes for plan in plans]
    for plan, nbytes in zip(plans, sizes, strict=True):
        settled = plan.writers >= 0
        np.add.at(load, plan.writers[settled], nbytes[settled])
    open_pieces = [np.flatnonzero(plan.writers < 0) for plan in plans]
    leaves = np.repeat(np.arange(len(plans)), [pieces.size for pieces in open_pieces])
    pieces = np.concatenate([np.zeros(0, np.int64), *open_pieces])
    nbytes = np.concatenate([np.zeros(0, np.int64), *(s[p] for s, p in zip(sizes, open_pieces, strict=True))])
    # lexsort is stable and argmin takes the first of equals: ties go by path, place in the leaf, lowest rank.
    for index in np.lexsort((pieces, leaves, -nbytes)).tolist():
        plan, piece = plans[leaves[index]], pieces[index]
        holders = plan.ranks[plan.bounds[2 * piece] : plan.bounds[2 * piece + 1]]
        writer = holders[np.argmin(load[holders])]
        load[writer] += nbytes[index]
        plan.writers[piece] = writer


def _hand_out(plan: _Plan, result: list[list[Assigned]]) -> None:
    """Give each holder its pieces."""
    by_writer = np.argsort(plan.writers, kind="stable")
    begins = np.searchsorted(plan.writers, plan.holders, "left", sorter=by_writer).tolist()
    ends = np.searchsorted(plan.writers, plan.holders, "right", sorter=by_writer).tolist()
    lowest = plan.holders[0]
    for rank, begin, end in zip(plan.holders, begins, ends, strict=True):
        mine = by_writer[begin:end]
        names = tuple(map(str, mine.tolist())) if plan.chunk_shape is None else ()
        writes = mine.size > 0 or (is_zero_sized(plan.head.shape) and rank == lowest)
        offsets, lengths = plan.offsets[mine], plan.lengths[mine]
        result[rank].append(_assigned(plan.head, plan.chunk_shape, writes, offsets, lengths, names))


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
