"""The coordinator's part: the rows of all ranks become one layout table, or the save fails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ckptengine.comm.ranks import name_ranks
from ckptengine.errors import SaveFailedError
from ckptengine.layout.head import LeafLayout, path_order
from ckptengine.layout.rows import LeafRecord, RankRows, RowTable, faulty_row
from ckptengine.layout.tiling import Int64s, find_fault, strides_of, untiled
from ckptengine.state.leaf import Path, Placement

__all__ = ["merge"]


class _Leaves:
    """The distinct leaves of all ranks, numbered as they come; a table that ranks share is read once."""

    def __init__(self) -> None:
        self.layouts: list[LeafLayout] = []
        self.owners: list[int | None] = []
        self.first_ranks: list[int] = []
        self._numbers: dict[tuple[Path, int | None], int] = {}
        self._tables: dict[int, tuple[Int64s, list[int]]] = {}

    def numbers_of(self, rows: RankRows) -> Int64s:
        """Return the number of each leaf of one rank's table."""
        # Keyed by identity, which holds while the caller holds all tables: hashing each would cost more.
        known = self._tables.get(id(rows.leaves))
        if known is None:
            shared = [leaf.placement is not Placement.PER_RANK for leaf in rows.leaves]
            numbers = [
                self._number(leaf, None, rows.rank) if is_shared else -1
                for leaf, is_shared in zip(rows.leaves, shared, strict=True)
            ]
            own = [place for place, is_shared in enumerate(shared) if not is_shared]
            known = self._tables[id(rows.leaves)] = np.asarray(numbers, np.int64), own
            listed = [(leaf.path, leaf.placement is Placement.PER_RANK) for leaf in rows.leaves]
            if len({path for path, _ in listed}) != len(listed):
                raise SaveFailedError(f"rank {rows.rank} lists a leaf twice; the save was not committed, save again")
        numbers_of, own = known[0], known[1]
        if own:
            numbers_of = numbers_of.copy()
            for place in own:
                numbers_of[place] = self._number(rows.leaves[place], rows.rank, rows.rank)
        return numbers_of

    def _number(self, leaf: LeafLayout, owner: int | None, rank: int) -> int:
        number = self._numbers.setdefault((leaf.path, owner), len(self.layouts))
        if number == len(self.layouts):
            self.layouts.append(leaf)
            self.owners.append(owner)
            self.first_ranks.append(rank)
        known = self.layouts[number]
        if (known.dtype, known.shape, known.placement, known.chunk_shape) != (
            leaf.dtype,
            leaf.shape,
            leaf.placement,
            leaf.chunk_shape,
        ):
            raise SaveFailedError(
                f"{leaf.name}: rank {self.first_ranks[number]} wrote {_said(known)}, rank {rank} "
                f"{_said(leaf)}; the save was not committed: give all ranks the same state and save again"
            )
        return number

    def check_kinds(self) -> None:
        """Raise where a path is per rank on one rank and shared on another."""
        shared = {
            leaf.path: rank
            for leaf, owner, rank in zip(self.layouts, self.owners, self.first_ranks, strict=True)
            if owner is None
        }
        for leaf, owner in zip(self.layouts, self.owners, strict=True):
            if owner is not None and leaf.path in shared:
                raise SaveFailedError(
                    f"{leaf.name}: rank {shared[leaf.path]} shares it with all ranks, rank {owner} keeps its "
                    "own; the save was not committed: wrap it in PerRank on all ranks or on none, and save "
                    "again"
                )


def merge(per_rank: Sequence[RankRows]) -> RowTable:
    """Return the table of the whole checkpoint from the rows of each rank's archive.

    Boxes that several ranks wrote become one row, the lowest rank's. Raises SaveFailedError, naming leaf and
    ranks, where ranks disagree about a leaf, a row can't be one of its boxes, or the boxes do not cover each
    element of a leaf exactly once; a leaf that a rank lists and nobody wrote is one of those.
    """
    ordered = sorted(per_rank, key=lambda rows: rows.rank)
    ranks = [rows.rank for rows in ordered]
    if len(set(ranks)) != len(ranks):
        raise SaveFailedError("two tables came from one rank; the save was not committed, save again")
    leaves = _Leaves()
    numbers = [leaves.numbers_of(rows) for rows in ordered]
    leaves.check_kinds()
    keys = [
        (path_order(leaf.path), -1 if owner is None else owner)
        for leaf, owner in zip(leaves.layouts, leaves.owners, strict=True)
    ]
    by_key = sorted(range(len(keys)), key=keys.__getitem__)
    layouts = [leaves.layouts[number] for number in by_key]
    places = np.zeros(len(keys), np.int64)
    places[by_key] = np.arange(len(keys))

    empty = np.zeros(0, np.int64)
    counts = [rows.counts for rows in ordered]
    leaf = np.concatenate([empty, *(np.repeat(places[n], c) for n, c in zip(numbers, counts, strict=True))])
    archive = np.repeat(np.asarray(ranks, np.int64), [rows.position.size for rows in ordered])
    position, nbytes, offsets, lengths = (
        np.concatenate([empty, *(getattr(rows, name) for rows in ordered)])
        for name in ("position", "nbytes", "offsets", "lengths")
    )
    ndims = np.asarray([len(layout.shape) for layout in layouts], np.int64)
    row_ndims = ndims[leaf]
    starts = np.cumsum(row_ndims) - row_ndims

    # Stable, and the rows are in the order of the ranks: of equal boxes the lowest rank's comes first.
    order = np.lexsort((_linear(layouts, leaf, starts, offsets), leaf))
    kept = order[~_repeats(order, leaf, row_ndims, starts, offsets, lengths)]
    gathered = _ragged(starts[kept], row_ndims[kept])
    offsets, lengths, archive, leaf = offsets[gathered], lengths[gathered], archive[kept], leaf[kept]
    position, nbytes = position[kept], nbytes[kept]
    row_counts = np.bincount(leaf, minlength=len(layouts)).astype(np.int64)

    ends = np.cumsum(row_counts).tolist()
    records = tuple(
        LeafRecord(
            layout.path,
            layout.dtype,
            layout.shape,
            layout.placement,
            layout.container,
            layout.chunk_shape,
            leaves.owners[number],
            (end - count, end),
        )
        for layout, number, end, count in zip(layouts, by_key, ends, row_counts.tolist(), strict=True)
    )
    table = RowTable(records, archive.astype(np.int32), position, nbytes, offsets, lengths)
    _check(table, row_counts, ordered)
    return table


def _check(table: RowTable, counts: Int64s, per_rank: Sequence[RankRows]) -> None:
    fault = faulty_row(table.leaves, counts, table.nbytes, table.offsets, table.lengths)
    if fault is None and table.position.size and int(table.position.min()) < 0:
        row = int(np.argmin(table.position))
        fault = int(np.searchsorted(np.cumsum(counts), row, "right")), row, "has a negative position"
    if fault is not None:
        place, row, why = fault
        raise SaveFailedError(
            f"{table.leaves[place].name}: a box that rank {table.archive[row]} wrote {why}; the save was not "
            f"committed, save again"
        )
    wrong = untiled([record.shape for record in table.leaves], counts, table.offsets, table.lengths)
    if not wrong.size:
        return
    place = int(wrong[0])
    record = table.leaves[place]
    offsets, lengths = table.boxes(place)
    found = find_fault(record.shape, offsets, lengths)
    assert found is not None
    more = f" (and {wrong.size - 1} leaves more)" if wrong.size > 1 else ""
    if found.rows:
        ranks = table.archive[[record.rows[0] + row for row in found.rows]].tolist()
        problem = f"element {list(found.element)} was written {len(found.rows)} times, by {name_ranks(ranks)}"
    else:
        missing = max(1, math.prod(record.shape) - sum(lengths.prod(axis=1).tolist()))
        holders = [rows.rank for rows in per_rank if any(leaf.path == record.path for leaf in rows.leaves)]
        problem = (
            f"{missing} of {math.prod(record.shape)} elements were written by no rank, for example "
            f"{list(found.element)}; the leaf is in the state of {name_ranks(holders)}"
        )
    raise SaveFailedError(
        f"{record.name}{more}: {problem}; the save was not committed: the ranks' states changed in different "
        "ways, the next save plans anew"
    )


def _linear(layouts: Sequence[LeafLayout], leaf: Int64s, starts: Int64s, offsets: Int64s) -> Int64s:
    """Return the C-order index of each row's offset in its leaf: it orders boxes and is one number."""
    ndims = np.asarray([len(layout.shape) for layout in layouts], np.int64)
    strides = np.asarray([stride for layout in layouts for stride in strides_of(layout.shape)], np.int64)
    stride_starts = np.cumsum(ndims) - ndims
    result = np.zeros(leaf.size, np.int64)
    for dim in range(int(ndims.max(initial=0))):
        rows = np.flatnonzero(ndims[leaf] > dim)
        result[rows] += offsets[starts[rows] + dim] * strides[stride_starts[leaf[rows]] + dim]
    return result


def _repeats(
    order: Int64s, leaf: Int64s, row_ndims: Int64s, starts: Int64s, offsets: Int64s, lengths: Int64s
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return for each sorted row whether it is the same box as the row before."""
    result = np.zeros(order.size, np.bool_)
    result[1:] = leaf[order[1:]] == leaf[order[:-1]]
    for dim in range(int(row_ndims.max(initial=0))):
        pairs = np.flatnonzero(result[1:] & (row_ndims[order[1:]] > dim))
        this, before = starts[order[pairs + 1]] + dim, starts[order[pairs]] + dim
        result[pairs + 1] = (offsets[this] == offsets[before]) & (lengths[this] == lengths[before])
    return result


def _ragged(starts: Int64s, sizes: Int64s) -> Int64s:
    """Return the indices of consecutive stretches: `starts[i]`, …, `starts[i] + sizes[i] - 1` for each i."""
    shift = starts - (np.cumsum(sizes) - sizes)
    return np.repeat(shift, sizes) + np.arange(int(sizes.sum()))


def _said(leaf: LeafLayout) -> str:
    stored = "as fragments" if leaf.chunk_shape is None else f"in chunks of {leaf.chunk_shape}"
    return f"{leaf.placement.value} {leaf.dtype} of shape {leaf.shape} {stored}"
