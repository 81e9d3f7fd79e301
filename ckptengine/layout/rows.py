"""The layout table: which box of which leaf lies where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptengine.layout.grid import cell_boxes, cell_counts
from ckptengine.layout.tiling import Int64s, inside
from ckptengine.schema.head import LeafLayout, layout_from_json, layout_to_json
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, path_order

__all__ = [
    "LeafRecord",
    "RowTable",
    "Rows",
    "check_boxes",
    "check_places",
    "index_of",
    "leaves_from_json",
    "leaves_to_json",
    "number_starts",
]


@dataclass(frozen=True, slots=True)
class LeafRecord(LeafLayout):
    """One leaf of a checkpoint: `rows` are its rows' start and stop; `rank` is whose it is if `PER_RANK`.

    The rows of a grid are all of its cells, in C order; those of fragments are sorted by place in the leaf.
    """

    rank: int | None
    rows: tuple[int, int]

    @property
    def is_grid(self) -> bool:
        """Whether the boxes follow from the chunk shape; those of fragments are stored."""
        return self.chunk_shape is not None


class Rows(Protocol):
    """What a reader asks of a layout table, in memory or in a file of which only what is asked for is read."""

    @property
    def leaves(self) -> tuple[LeafRecord, ...]:
        """All leaves, sorted by path and rank."""

    @property
    def index(self) -> Mapping[tuple[Path, int | None], int]:
        """The place in `leaves` of each path and rank (None where the leaf is not `PER_RANK`)."""

    def places(self, rows: Int64s, nbytes: Int64s) -> tuple[Int64s, Int64s]:
        """Return archive and position of the chunks of these rows, whose sizes are `nbytes`; all int64 [n].

        Raises CheckpointDamagedError where a chunk can't lie there.
        """

    def boxes(self, leaf: int) -> tuple[Int64s, Int64s]:
        """Return offsets and lengths, int64 [rows, ndim], of all rows of `leaves[leaf]`.

        Raises CheckpointDamagedError where they can't be its boxes.
        """

    def orders(self, rows: Int64s) -> Sequence[tuple[int, ...] | None] | None:
        """Return the order in which each row's chunk is stored: dimensions from the outermost inward; None: C order.

        None where all are in C order, as in every checkpoint of ours. Asked after `places`, for the same rows.
        """


@dataclass(frozen=True)
class RowTable:
    """All leaves, sorted by path and rank, and their rows.

    `archive` (int32: the rank that wrote it) and `position` (int64, byte of that archive) have one number per
    row; `offsets` and `lengths` hold the boxes of the fragments' rows, one after the other, as 1-D int64.
    """

    leaves: tuple[LeafRecord, ...]
    archive: NDArray[np.int32] = field(compare=False, repr=False)
    position: Int64s = field(compare=False, repr=False)
    offsets: Int64s = field(compare=False, repr=False)
    lengths: Int64s = field(compare=False, repr=False)

    @cached_property
    def index(self) -> dict[tuple[Path, int | None], int]:
        """The place in `leaves` of each path and rank (None where the leaf is not `PER_RANK`)."""
        return index_of(self.leaves)

    def places(self, rows: Int64s, nbytes: Int64s) -> tuple[Int64s, Int64s]:
        """Return archive and position of these rows, int64 [n]."""
        return self.archive[rows].astype(np.int64), self.position[rows]

    def boxes(self, leaf: int) -> tuple[Int64s, Int64s]:
        """Return offsets and lengths, int64 [rows, ndim], of `leaves[leaf]`."""
        record = self.leaves[leaf]
        count = record.rows[1] - record.rows[0]
        if record.chunk_shape is not None:
            return cell_boxes(record.shape, record.chunk_shape, np.arange(count))
        part = slice(*self._starts[leaf : leaf + 2])
        shape = (count, len(record.shape))
        return self.offsets[part].reshape(shape), self.lengths[part].reshape(shape)

    def orders(self, rows: Int64s) -> None:
        """All chunks are in C order."""

    @cached_property
    def _starts(self) -> list[int]:
        return number_starts(self.leaves)


def index_of(leaves: Sequence[LeafRecord]) -> dict[tuple[Path, int | None], int]:
    """Return the place of each path and rank."""
    return {(leaf.path, leaf.rank): place for place, leaf in enumerate(leaves)}


def number_starts(leaves: Sequence[LeafRecord]) -> list[int]:
    """Return where each leaf's boxes start among the numbers of all, and at last where they end; grids have none."""
    starts = [0]
    for leaf in leaves:
        starts.append(starts[-1] + (0 if leaf.is_grid else (leaf.rows[1] - leaf.rows[0]) * len(leaf.shape)))
    return starts


def leaves_to_json(leaves: Sequence[LeafRecord]) -> list[dict[str, Any]]:
    """Return the leaves as JSON-able dicts for the layout file."""
    return [{**layout_to_json(leaf), "rank": leaf.rank, "rows": list(leaf.rows)} for leaf in leaves]


def leaves_from_json(leaves: object) -> tuple[LeafRecord, ...]:
    """Return the leaves that `leaves_to_json` described, believing nothing; ValueError says what is wrong.

    Each leaf has as many rows as its shape allows: all cells of a grid, or no more fragments than elements.
    """
    if not isinstance(leaves, list):
        raise ValueError("its leaves are no list")
    records = tuple(map(_record, leaves))
    _check_order(records)
    begin = 0
    for record in records:
        start, stop = record.rows
        if start != begin or stop < start:
            raise ValueError(f"leaf {record.name}: rows {record.rows} don't follow those of the leaf before")
        begin = stop
        if record.chunk_shape is not None:
            cells = math.prod(cell_counts(record.shape, record.chunk_shape))
            if stop - start != cells:
                raise ValueError(f"leaf {record.name}: its grid has {cells} cells, not {stop - start}")
        elif stop - start > math.prod(record.shape):
            raise ValueError(f"leaf {record.name}: {stop - start} fragments are more than it has elements")
    return records


def check_places(archive: Int64s, position: Int64s, nbytes: Int64s, fixed_nbytes: Int64s) -> None:
    """Raise ValueError where `nbytes` at `position` (int64 [n]) are not within an archive's `fixed_nbytes`."""
    bad = (archive < 0) | (archive >= fixed_nbytes.size)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"a row names archive {archive[row]}, which there is not")
    room = fixed_nbytes[archive]
    bad = (position < 0) | (nbytes < 0) | (nbytes > room) | (position > room - np.where(nbytes > 0, nbytes, 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"{nbytes[row]} bytes at {position[row]} do not lie within archive {archive[row]}")


def check_boxes(record: LeafRecord, offsets: Int64s, lengths: Int64s) -> None:
    """Raise ValueError where a box (int64 [n, ndim]) is empty or leaves the shape of its leaf."""
    good = inside(record.shape, offsets, lengths)
    if not good.all():
        raise ValueError(f"leaf {record.name}: row {int(np.argmin(good))} is empty or outside of its shape")


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
    return LeafRecord(
        layout.path,
        layout.dtype,
        layout.shape,
        layout.placement,
        layout.container,
        layout.chunk_shape,
        rank,
        (rows[0], rows[1]),
    )
