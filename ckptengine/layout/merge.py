"""The coordinator's part: the rows of all ranks become one layout table, or the save fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import SaveFailedError
from ckptengine.layout.grid import cell_boxes, cell_counts
from ckptengine.layout.rank_rows import PackedRows, RankRows
from ckptengine.layout.rows import LeafRecord, RowTable
from ckptengine.layout.tiling import Int64s, find_fault, inside, linear, untiled
from ckptengine.schema.head import LeafLayout
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, path_order
from ckptengine.schema.ranks import name_ranks

__all__ = ["merge"]

_BATCH_ROWS = 1 << 19  # rows that are put into their places at a time: some 10 MB


class _Leaves:
    """The distinct leaves of all ranks, numbered as they come; a table that ranks share is read once."""

    def __init__(self) -> None:
        self.layouts: list[LeafLayout] = []
        self.owners: list[int | None] = []
        self.first_ranks: list[int] = []
        self._numbers: dict[tuple[Path, int | None], int] = {}
        self._tables: dict[int, tuple[Int64s, list[int]]] = {}

    def numbers_of(self, rows: RankRows | PackedRows) -> Int64s:
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


def merge(per_rank: Sequence[RankRows | PackedRows]) -> RowTable:
    """Return the table of the whole checkpoint from the rows of each rank's archive.

    Boxes that several ranks wrote become one row, the lowest rank's. Raises SaveFailedError, naming leaf and
    ranks, where ranks disagree about a leaf, a row can't be one of its boxes, or the boxes do not cover each
    element of a leaf exactly once; a leaf that a rank lists and nobody wrote is one of those.

    Rows of grids are put straight into their places, so that only some ranks' rows are unpacked at a time and
    nothing is sorted as a whole. Those of fragments are collected, sorted and checked by their boxes.
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

    grid = _Grid(layouts, ordered, numbers, places)
    fragments = _Fragments(layouts)
    # From the last rank to the first: of equal boxes the lowest rank's row is the one that stays.
    for rows, of_table in zip(reversed(ordered), reversed(numbers), strict=True):
        unpacked = rows.rows()
        leaf = np.repeat(places[of_table], unpacked.counts)
        if unpacked.position.size and int(unpacked.position.min()) < 0:
            name = layouts[leaf[int(np.argmin(unpacked.position))]].name
            raise _refused(f"{name}: a box that rank {rows.rank} wrote has a negative position")
        is_cell = grid.holds[leaf]
        grid.add(rows.rank, leaf[is_cell], unpacked.cells, unpacked.position[is_cell])
        fragments.add(rows.rank, leaf[~is_cell], unpacked)
    grid.finish(ordered)
    return _table(layouts, [leaves.owners[number] for number in by_key], grid, fragments.finish(ordered))


class _Grid:
    """The rows of all leaves that are grids, each at the place of its cell; the leaves' cells follow each other."""

    def __init__(
        self,
        layouts: Sequence[LeafLayout],
        ordered: Sequence[RankRows | PackedRows],
        numbers: Sequence[Int64s],
        places: Int64s,
    ) -> None:
        self._layouts = layouts
        self._chunks = {n: leaf.chunk_shape for n, leaf in enumerate(layouts) if leaf.chunk_shape is not None}
        self.holds = np.zeros(len(layouts), np.bool_)
        self.holds[list(self._chunks)] = True
        # In Python's integers: what ranks claim may not fit in 64 bits.
        cells = [0] * len(layouts)
        for place, chunk in self._chunks.items():
            cells[place] = math.prod(cell_counts(layouts[place].shape, chunk))
        if sum(cells) > sum(rows.count for rows in ordered):
            self._refuse_too_few(ordered, numbers, places, cells)
        self.counts = np.asarray(cells, np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.archive = np.full(sum(cells), -1, np.int32)
        self.position = np.zeros(sum(cells), np.int64)
        self._pending: list[tuple[Int64s, Int64s, NDArray[np.int32]]] = []
        self._pending_rows = 0

    def add(self, rank: int, leaf: Int64s, cells: Int64s, position: Int64s) -> None:
        """Add a rank's rows; ranks come in descending order. Raises SaveFailedError where one is no cell."""
        wrong = (cells < 0) | (cells >= self.counts[leaf])
        if wrong.any():
            name = self._layouts[leaf[int(np.argmax(wrong))]].name
            raise _refused(f"{name}: a box that rank {rank} wrote is no cell of its grid")
        self._pending.append((self.starts[leaf] + cells, position, np.full(cells.size, rank, np.int32)))
        self._pending_rows += cells.size
        if self._pending_rows >= _BATCH_ROWS:
            self._put()

    def _put(self) -> None:
        # One rank's rows lie a leaf apart, those of neighbouring ranks side by side: sorted, many share cache lines.
        rows, position, archive = map(np.concatenate, zip(*self._pending, strict=True))
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        # Where an index comes twice numpy keeps the last value: that of the lower rank.
        self.position[rows] = position[order]
        self.archive[rows] = archive[order]
        self._pending.clear()
        self._pending_rows = 0

    def finish(self, ordered: Sequence[RankRows | PackedRows]) -> None:
        """Raise SaveFailedError where a cell was written by no rank."""
        if self._pending:
            self._put()
        if not self.archive.size or int(self.archive.min()) >= 0:
            return
        missing = np.flatnonzero(self.archive < 0)
        leaves, first = np.unique(np.searchsorted(self.starts + self.counts, missing, "right"), return_index=True)
        place = int(leaves[0])
        layout = self._layouts[place]
        cells = missing[: first[1] if leaves.size > 1 else None] - self.starts[place]
        offsets, lengths = cell_boxes(layout.shape, self._chunks[place], cells)
        problem = _unwritten(layout, int(lengths.prod(axis=1).sum()), offsets[0].tolist(), ordered)
        raise _incomplete(layout, leaves.size, problem)

    def _refuse_too_few(
        self,
        ordered: Sequence[RankRows | PackedRows],
        numbers: Sequence[Int64s],
        places: Int64s,
        cells: Sequence[int],
    ) -> None:
        """Raise for the first leaf with fewer rows than cells; nothing is allocated by the cells that are claimed."""
        written = np.zeros(len(cells), np.int64)
        for rows, of_table in zip(ordered, numbers, strict=True):
            np.add.at(written, places[of_table], rows.rows().counts)
        short = [place for place, count in enumerate(written.tolist()) if count < cells[place]]
        place, layout, chunk = short[0], self._layouts[short[0]], self._chunks[short[0]]
        found = [np.zeros(0, np.int64)]
        for rows, of_table in zip(ordered, numbers, strict=True):
            unpacked = rows.rows()
            leaf = np.repeat(places[of_table], unpacked.counts)
            found.append(unpacked.cells[leaf[self.holds[leaf]] == place])
        there = np.unique(np.concatenate(found))
        there = there[(there >= 0) & (there < cells[place])]
        hole = int(np.argmax(np.append(there != np.arange(there.size), True)))
        lengths = cell_boxes(layout.shape, chunk, there)[1]
        element = cell_boxes(layout.shape, chunk, np.asarray([hole]))[0][0].tolist()
        missing = math.prod(layout.shape) - sum(lengths.prod(axis=1).tolist())
        raise _incomplete(layout, len(short), _unwritten(layout, missing, element, ordered))


@dataclass(frozen=True, slots=True)
class _Boxes:
    """The rows of one leaf that is fragments: archive, position int64 [n]; offsets, lengths int64 [n, ndim]."""

    archive: Int64s
    position: Int64s
    offsets: Int64s
    lengths: Int64s


class _Fragments:
    """The rows of all leaves that are fragments."""

    def __init__(self, layouts: Sequence[LeafLayout]) -> None:
        self._layouts = layouts
        self._rows: dict[int, list[_Boxes]] = {}

    def add(self, rank: int, leaf: Int64s, unpacked: RankRows) -> None:
        """Add a rank's rows; `leaf` has the leaf of each, in the order of the rank's table."""
        if not leaf.size:
            return
        table = np.repeat([layout.chunk_shape is None for layout in unpacked.leaves], unpacked.counts)
        position, start = unpacked.position[table], 0
        for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(leaf)) + 1).tolist(), leaf.size]):
            place = int(leaf[begin])
            ndim = len(self._layouts[place].shape)
            numbers = slice(start, start + (end - begin) * ndim)
            start = numbers.stop
            boxes = (column[numbers].reshape(end - begin, ndim) for column in (unpacked.offsets, unpacked.lengths))
            archive = np.full(end - begin, rank, np.int64)
            self._rows.setdefault(place, []).append(_Boxes(archive, position[begin:end], *boxes))

    def finish(self, ordered: Sequence[RankRows | PackedRows]) -> dict[int, _Boxes]:
        """Return the rows of each leaf, sorted by place in it; raises SaveFailedError where they don't tile it."""
        result = {}
        for place, layout in enumerate(self._layouts):
            if layout.chunk_shape is None:
                nothing, no_box = np.zeros(0, np.int64), np.zeros((0, len(layout.shape)), np.int64)
                parts = self._rows.get(place, [_Boxes(nothing, nothing, no_box, no_box)])
                result[place] = _distinct(layout, parts)
        wrong = untiled(
            [self._layouts[place].shape for place in result],
            np.asarray([rows.archive.size for rows in result.values()], np.int64),
            *(_joined(getattr(rows, name) for rows in result.values()) for name in ("offsets", "lengths")),
        )
        if wrong.size:
            place = list(result)[int(wrong[0])]
            layout, rows = self._layouts[place], result[place]
            fault = find_fault(layout.shape, rows.offsets, rows.lengths)
            if fault.rows:
                writers = name_ranks(rows.archive[list(fault.rows)].tolist())
                problem = f"element {list(fault.element)} was written {len(fault.rows)} times, by {writers}"
            else:
                missing = max(1, math.prod(layout.shape) - sum(rows.lengths.prod(axis=1).tolist()))
                problem = _unwritten(layout, missing, list(fault.element), ordered)
            raise _incomplete(layout, wrong.size, problem)
        return result


def _distinct(layout: LeafLayout, parts: Sequence[_Boxes]) -> _Boxes:
    """Return the rows of one leaf by place; of equal boxes the lowest rank's. Raises where one is not inside."""
    archive, position, offsets, lengths = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("archive", "position", "offsets", "lengths")
    )
    good = inside(layout.shape, offsets, lengths)
    if not good.all():
        rank = archive[int(np.argmin(good))]
        raise _refused(f"{layout.name}: a box that rank {rank} wrote is empty or outside of its shape")
    # Within the shape, a box is known by its first and its last element.
    first, last = linear(layout.shape, offsets), linear(layout.shape, offsets + lengths - 1)
    order = np.lexsort((archive, last, first))
    fresh = np.ones(order.size, np.bool_)
    fresh[1:] = (np.diff(first[order]) != 0) | (np.diff(last[order]) != 0)
    order = order[fresh]
    return _Boxes(archive[order], position[order], offsets[order], lengths[order])


def _table(
    layouts: Sequence[LeafLayout], owners: Sequence[int | None], grid: _Grid, fragments: dict[int, _Boxes]
) -> RowTable:
    """Return the rows of grids and fragments in the order of the leaves."""
    records, stop = [], 0
    for place, (leaf, owner) in enumerate(zip(layouts, owners, strict=True)):
        start = stop
        stop += fragments[place].archive.size if place in fragments else int(grid.counts[place])
        records.append(
            LeafRecord(
                leaf.path,
                leaf.dtype,
                leaf.shape,
                leaf.placement,
                leaf.container,
                leaf.chunk_shape,
                owner,
                (start, stop),
            )
        )
    archive, position = grid.archive, grid.position
    if fragments:
        archives: list[NDArray[Any]] = []
        positions: list[Int64s] = []
        for place, begin, count in zip(range(len(layouts)), grid.starts.tolist(), grid.counts.tolist(), strict=True):
            cells, boxes = slice(begin, begin + count), fragments.get(place)
            archives.append(grid.archive[cells] if boxes is None else boxes.archive)
            positions.append(grid.position[cells] if boxes is None else boxes.position)
        archive, position = np.concatenate(archives).astype(np.int32), np.concatenate(positions)
    numbers = (_joined(getattr(rows, name) for rows in fragments.values()) for name in ("offsets", "lengths"))
    return RowTable(tuple(records), archive, position, *numbers)


def _joined(arrays: Iterable[Int64s]) -> Int64s:
    return np.concatenate([np.zeros(0, np.int64), *(array.reshape(-1) for array in arrays)])


def _unwritten(
    layout: LeafLayout, missing: int, element: Sequence[int], ordered: Sequence[RankRows | PackedRows]
) -> str:
    holders = [rows.rank for rows in ordered if any(leaf.path == layout.path for leaf in rows.leaves)]
    return (
        f"{missing} of {math.prod(layout.shape)} elements were written by no rank, for example {list(element)}; the "
        f"leaf is in the state of {name_ranks(holders)}"
    )


def _incomplete(layout: LeafLayout, count: int, problem: str) -> SaveFailedError:
    more = f" (and {count - 1} leaves more)" if count > 1 else ""
    return SaveFailedError(
        f"{layout.name}{more}: {problem}; the save was not committed: the ranks' states changed in different ways, "
        "the next save plans anew"
    )


def _refused(problem: str) -> SaveFailedError:
    return SaveFailedError(f"{problem}; the save was not committed, save again")


def _said(leaf: LeafLayout) -> str:
    stored = "as fragments" if leaf.chunk_shape is None else f"in chunks of {leaf.chunk_shape}"
    return f"{leaf.placement.value} {leaf.dtype} of shape {leaf.shape} {stored}"
