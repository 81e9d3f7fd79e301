"""The layout table: which box of which leaf lies where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import CheckpointDamagedError, SaveFailedError
from ckptengine.layout.assign import Assigned
from ckptengine.layout.head import LeafLayout, layout_from_json, layout_to_json, path_order
from ckptengine.layout.packing import pack, parse_json, unpack
from ckptengine.layout.tiling import Int64s
from ckptengine.state.leaf import Path, Placement

__all__ = ["LeafRecord", "RankRows", "RowTable", "columns", "faulty_row", "from_columns", "leaves_to_json"]

_MAX_POSITION = 1 << 62
_COLUMNS = ("archive", "position", "nbytes", "offsets", "lengths")


@dataclass(frozen=True, slots=True)
class RankRows:
    """The rows of one rank's archive: where each box that it wrote lies.

    `leaves` are all that the rank holds, also those that others wrote; `counts` (int64, one per leaf) says
    how many rows each has. `position` and `nbytes` (int64, one per row, bytes of the archive) are in the
    order of the leaves; `offsets` and `lengths` hold each row's box, one after the other, as 1-D int64.
    """

    rank: int
    leaves: tuple[LeafLayout, ...]
    counts: Int64s = field(compare=False, repr=False)
    position: Int64s = field(compare=False, repr=False)
    nbytes: Int64s = field(compare=False, repr=False)
    offsets: Int64s = field(compare=False, repr=False)
    lengths: Int64s = field(compare=False, repr=False)

    @classmethod
    def of(cls, rank: int, assigned: Sequence[Assigned], position: Int64s, nbytes: Int64s) -> RankRows:
        """Return the rows of what this rank was assigned; `position` and `nbytes` follow its boxes' order."""
        leaves = tuple(
            LeafLayout(leaf.path, leaf.dtype, leaf.shape, leaf.placement, leaf.container, leaf.chunk_shape)
            for leaf in assigned
        )
        counts = np.asarray([leaf.offsets.shape[0] for leaf in assigned], np.int64)
        empty = np.zeros(0, np.int64)
        offsets = np.concatenate([empty, *(leaf.offsets.reshape(-1) for leaf in assigned)])
        lengths = np.concatenate([empty, *(leaf.lengths.reshape(-1) for leaf in assigned)])
        return cls(rank, leaves, counts, position, nbytes, offsets, lengths)

    def encode(self) -> bytes:
        """Return the rows as one message; ranks with the same leaves send the same leaf table."""
        rank = np.asarray([self.rank], np.int64)
        rows = [self.counts, self.position, self.nbytes, self.offsets, self.lengths]
        return pack([layout_to_json(leaf) for leaf in self.leaves], [rank, *rows])

    @classmethod
    def decode(cls, message: bytes) -> RankRows:
        """Return the rows that `encode` was called on; raises SaveFailedError where the message is damaged.

        Ranks with the same leaves get the same `leaves` object. Whether the rows make sense is for `merge`.
        """
        try:
            table, (rank, counts, position, nbytes, offsets, lengths) = unpack(message, columns=6)
            leaves = _layouts(table)
            ndims = np.asarray([len(leaf.shape) for leaf in leaves], np.int64)
            if rank.size != 1 or not 0 <= rank[0] < 2**31:
                raise ValueError("it has no rank")
            if counts.size != len(leaves) or (counts < 0).any() or (counts > position.size).any():
                raise ValueError("its counts don't fit its leaves")
            if not int(counts.sum()) == position.size == nbytes.size:
                raise ValueError("its counts don't fit its rows")
            if not int((counts * ndims).sum()) == offsets.size == lengths.size:
                raise ValueError("its counts don't fit its boxes")
        except ValueError as error:
            raise SaveFailedError(
                f"a rank's table of what it wrote is damaged ({error}); the save was not committed, save again"
            ) from error
        return cls(int(rank[0]), leaves, counts, position, nbytes, offsets, lengths)


@dataclass(frozen=True, slots=True)
class LeafRecord(LeafLayout):
    """One leaf of a checkpoint: `rows` are its rows' start and stop; `rank` is whose it is if `PER_RANK`."""

    rank: int | None
    rows: tuple[int, int]


@dataclass(frozen=True)
class RowTable:
    """All leaves, sorted by path and rank, and the rows of their boxes, sorted by leaf and place in the leaf.

    `archive` (int32: the rank that wrote it), `position` and `nbytes` (int64, bytes of that archive) have one
    number per row; `offsets` and `lengths` hold each row's box, one after the other, as 1-D int64.
    """

    leaves: tuple[LeafRecord, ...]
    archive: NDArray[np.int32] = field(compare=False, repr=False)
    position: Int64s = field(compare=False, repr=False)
    nbytes: Int64s = field(compare=False, repr=False)
    offsets: Int64s = field(compare=False, repr=False)
    lengths: Int64s = field(compare=False, repr=False)

    @cached_property
    def index(self) -> dict[tuple[Path, int | None], int]:
        """The place in `leaves` of each path and rank (None where the leaf is not `PER_RANK`)."""
        return {(leaf.path, leaf.rank): place for place, leaf in enumerate(self.leaves)}

    def boxes(self, leaf: int) -> tuple[Int64s, Int64s]:
        """Return offsets and lengths, int64 [rows, ndim], of `leaves[leaf]`."""
        start, stop = self.rows_in_boxes[leaf : leaf + 2]
        record = self.leaves[leaf]
        shape = (record.rows[1] - record.rows[0], len(record.shape))
        return self.offsets[start:stop].reshape(shape), self.lengths[start:stop].reshape(shape)

    @cached_property
    def rows_in_boxes(self) -> list[int]:
        """Where each leaf's boxes start in `offsets` and `lengths`, and where the last one's end."""
        sizes = [(leaf.rows[1] - leaf.rows[0]) * len(leaf.shape) for leaf in self.leaves]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


def columns(table: RowTable) -> dict[str, NDArray[Any]]:
    """Return the columns that the layout file stores: 1-D integer arrays under their names."""
    return {name: getattr(table, name) for name in _COLUMNS}


def leaves_to_json(table: RowTable) -> list[dict[str, Any]]:
    """Return the leaves as JSON-able dicts for the layout file."""
    return [{**layout_to_json(leaf), "rank": leaf.rank, "rows": list(leaf.rows)} for leaf in table.leaves]


def from_columns(
    leaves: object, columns: Mapping[str, NDArray[Any]], fixed_nbytes: Sequence[int] | None = None
) -> RowTable:
    """Return the table that `leaves_to_json` and `columns` described, believing nothing.

    `fixed_nbytes` are the sizes of the archives' fixed regions, where they are known: then every row must lie
    in one. Raises CheckpointDamagedError that says what is wrong; allocates no more than a few times what it
    is given.
    """
    try:
        return _from_columns(leaves, columns, fixed_nbytes)
    except ValueError as error:
        raise CheckpointDamagedError(f"the layout file is damaged: {error}; restore an older checkpoint") from error


def faulty_row(
    leaves: Sequence[LeafLayout], counts: Int64s, nbytes: Int64s, offsets: Int64s, lengths: Int64s
) -> tuple[int, int, str] | None:
    """Return a leaf and a row of it that can't be one of its boxes, and why; None where all can.

    A box must lie within the shape and, in a leaf that is a grid, be one of its cells; `nbytes` must be what
    the dense chunk takes. All are flat int64, `counts` one per leaf, `nbytes` one per row.
    """
    ndims = np.asarray([len(leaf.shape) for leaf in leaves], np.int64)
    leaf_of_row = np.repeat(np.arange(len(leaves)), counts)
    row_ndims = ndims[leaf_of_row]
    starts = np.cumsum(row_ndims) - row_ndims
    leaf_starts = np.cumsum(ndims) - ndims
    shapes = np.asarray([length for leaf in leaves for length in leaf.shape], np.int64)
    # A chunk length of 0 stands for fragments, which are as large as their boxes.
    chunks = np.asarray([length for leaf in leaves for length in leaf.chunk_shape or (0,) * len(leaf.shape)], np.int64)
    outside = np.zeros(leaf_of_row.size, np.bool_)
    no_cell = outside.copy()
    dense = np.asarray([leaf.itemsize for leaf in leaves], np.int64)[leaf_of_row]
    for dim in range(int(ndims.max(initial=0))):
        rows = np.flatnonzero(row_ndims > dim)
        offset, length = offsets[starts[rows] + dim], lengths[starts[rows] + dim]
        shape = shapes[leaf_starts[leaf_of_row[rows]] + dim]
        chunk = chunks[leaf_starts[leaf_of_row[rows]] + dim]
        good = (offset >= 0) & (length >= 1) & (length <= shape) & (offset <= shape - np.where(length > 0, length, 0))
        offset, length = np.where(good, offset, 0), np.where(good, length, 0)
        step = np.where(chunk > 0, chunk, 1)
        cell = (offset % step == 0) & (length == np.minimum(chunk, shape - offset))
        outside[rows] |= ~good
        no_cell[rows] |= (chunk > 0) & ~cell
        dense[rows] *= np.where(chunk > 0, chunk, length)
    for bad, why in (
        (outside, "is empty or outside of its shape"),
        (no_cell, "is no cell of its grid"),
        (nbytes != dense, "has another size than its box takes"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            leaf = int(leaf_of_row[row])
            return leaf, row, why
    return None


def _from_columns(leaves: object, columns: Mapping[str, NDArray[Any]], fixed_nbytes: Sequence[int] | None) -> RowTable:
    if not isinstance(leaves, list):
        raise ValueError("its leaves are no list")
    if columns.keys() != set(_COLUMNS):
        raise ValueError(f"it must have the columns {', '.join(_COLUMNS)}")
    for name, column in columns.items():
        if column.ndim != 1 or column.dtype.kind != "i":
            raise ValueError(f"column {name} is no one-dimensional array of signed integers")
    archive, position, nbytes, offsets, lengths = (columns[name].astype(np.int64, copy=False) for name in _COLUMNS)
    if not archive.size == position.size == nbytes.size:
        raise ValueError("its columns differ in length")
    records = tuple(map(_record, leaves))
    _check_order(records)
    begin = 0
    for record in records:
        if record.rows[0] != begin or not begin <= record.rows[1] <= archive.size:
            raise ValueError(f"leaf {record.name}: rows {record.rows} don't follow those of the leaf before")
        begin = record.rows[1]
    if begin != archive.size:
        raise ValueError(f"{archive.size - begin} rows belong to no leaf")
    counts = np.asarray([record.rows[1] - record.rows[0] for record in records], np.int64)
    ndims = np.asarray([len(record.shape) for record in records], np.int64)
    if not int((counts * ndims).sum()) == offsets.size == lengths.size:
        raise ValueError("its boxes don't fit its rows")
    _check_places(archive, position, nbytes, fixed_nbytes)
    fault = faulty_row(records, counts, nbytes, offsets, lengths)
    if fault is not None:
        raise ValueError(f"leaf {records[fault[0]].name}: row {fault[1]} {fault[2]}")
    return RowTable(records, archive.astype(np.int32), position, nbytes, offsets, lengths)


def _check_places(archive: Int64s, position: Int64s, nbytes: Int64s, fixed_nbytes: Sequence[int] | None) -> None:
    limits = None if fixed_nbytes is None else np.asarray(fixed_nbytes, np.int64)
    bad = (archive < 0) | (archive >= (2**31 if limits is None else limits.size))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"row {row} names archive {archive[row]}, which there is not")
    room = _MAX_POSITION if limits is None else limits[archive]
    bad = (position < 0) | (nbytes < 0) | (nbytes > room) | (position > room - np.where(nbytes > 0, nbytes, 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"row {row}: {nbytes[row]} bytes at {position[row]} do not lie within archive {archive[row]}")


def _check_order(records: Sequence[LeafRecord]) -> None:
    """Raise unless the leaves are sorted by path and rank, each once, so that a path means one leaf."""
    keys = [(path_order(record.path), -1 if record.rank is None else record.rank) for record in records]
    for before, after, record in zip(keys, keys[1:], records[1:], strict=False):
        if before >= after:
            raise ValueError(f"leaf {record.name} comes twice or out of order")


def _record(value: object) -> LeafRecord:
    if not isinstance(value, dict) or "rank" not in value or "rows" not in value:
        raise ValueError("a leaf has no rank or no rows")
    rank, rows = value["rank"], value["rows"]
    layout = layout_from_json({name: item for name, item in value.items() if name not in ("rank", "rows")})
    own = layout.placement is Placement.PER_RANK
    if (own and (type(rank) is not int or not 0 <= rank < 2**31)) or (not own and rank is not None):
        raise ValueError(f"leaf {layout.name}: the rank {rank!r} does not fit the placement {layout.placement.value}")
    if not isinstance(rows, list) or len(rows) != 2 or not all(type(row) is int for row in rows):
        raise ValueError(f"leaf {layout.name}: rows must be two integers")
    return _recorded(layout, rank, (rows[0], rows[1]))


def _recorded(layout: LeafLayout, rank: int | None, rows: tuple[int, int]) -> LeafRecord:
    return LeafRecord(
        layout.path,
        layout.dtype,
        layout.shape,
        layout.placement,
        layout.container,
        layout.chunk_shape,
        rank,
        rows,
    )


@lru_cache(maxsize=4)
def _layouts(json_part: bytes) -> tuple[LeafLayout, ...]:
    """Return the leaf table; cached, because most ranks send the same one and `merge` looks at each once."""
    table = parse_json(json_part)
    if not isinstance(table, list):
        raise ValueError("its leaf table is no list")
    return tuple(map(layout_from_json, table))
