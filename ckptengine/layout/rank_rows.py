"""What one rank tells of its archive: where each box lies that it wrote."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import SaveFailedError
from ckptengine.layout.assign import Assigned
from ckptengine.layout.grid import cell_counts
from ckptengine.layout.packing import pack, parse_json, unpack
from ckptengine.layout.tiling import Int64s, linear
from ckptengine.schema.head import LeafLayout, layout_from_json, layout_to_json

__all__ = ["PackedRows", "RankRows"]

_TABLE_NBYTES = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class RankRows:
    """The rows of one rank's archive: where each box lies that it wrote.

    `leaves` are all that the rank holds, also those that others wrote; `counts` (int64, one per leaf) says
    how many rows each has. `position` (int64, one per row, byte of the archive) is in the order of the leaves.
    A row of a leaf that is a grid is one of its cells: `cells` has the number of each in C order. The other
    rows have boxes: `offsets` and `lengths`, one after the other, as 1-D int64.
    """

    rank: int
    leaves: tuple[LeafLayout, ...]
    counts: Int64s = field(compare=False, repr=False)
    position: Int64s = field(compare=False, repr=False)
    cells: Int64s = field(compare=False, repr=False)
    offsets: Int64s = field(compare=False, repr=False)
    lengths: Int64s = field(compare=False, repr=False)

    @classmethod
    def of(cls, rank: int, assigned: Sequence[Assigned], position: Int64s) -> RankRows:
        """Return the rows of what this rank was assigned; `position` follows its boxes' order."""
        leaves = tuple(
            LeafLayout(leaf.path, leaf.dtype, leaf.shape, leaf.placement, leaf.container, leaf.chunk_shape)
            for leaf in assigned
        )
        counts = np.asarray([leaf.offsets.shape[0] for leaf in assigned], np.int64)
        cells, offsets, lengths = [], [], []
        for leaf in assigned:
            if leaf.chunk_shape is None:
                offsets.append(leaf.offsets.reshape(-1))
                lengths.append(leaf.lengths.reshape(-1))
            elif leaf.offsets.shape[0]:
                index = leaf.offsets // np.asarray(leaf.chunk_shape, np.int64)
                cells.append(linear(cell_counts(leaf.shape, leaf.chunk_shape), index))
        empty = np.zeros(0, np.int64)
        joined = (np.concatenate([empty, *parts]) for parts in (cells, offsets, lengths))
        return cls(rank, leaves, counts, position, *joined)

    def encode(self) -> bytes:
        """Return the rows as one message; ranks with the same leaves send the same leaf table."""
        table = pack([layout_to_json(leaf) for leaf in self.leaves], [])
        return _TABLE_NBYTES.pack(len(table)) + table + self.columns()

    def columns(self) -> bytes:
        """Return the rows without the leaf table, compressed."""
        # Positions ascend in steps that repeat, which compress to a tenth of what the positions do.
        steps = np.diff(self.position, prepend=np.zeros(1, np.int64))
        return pack([self.rank, self.count], [self.counts, steps, self.cells, self.offsets, self.lengths])

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.position.size

    def rows(self) -> RankRows:
        """Return itself, as `PackedRows.rows` returns what it holds."""
        return self


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One rank's rows, their columns still compressed: rank 0 keeps one of these for each rank.

    `count` is the number of rows.
    """

    rank: int
    count: int
    table: _Table = field(repr=False)
    columns: bytes = field(compare=False, repr=False)

    @property
    def leaves(self) -> tuple[LeafLayout, ...]:
        """All leaves that the rank holds; ranks with the same have the same object."""
        return self.table.leaves

    @classmethod
    def decode(cls, message: bytes) -> PackedRows:
        """Return the rows that `RankRows.encode` was called on; raises SaveFailedError where there are none.

        Whether the rows make sense is for `merge`.
        """
        try:
            if len(message) < _TABLE_NBYTES.size:
                raise ValueError("it is cut short")
            end = _TABLE_NBYTES.size + _TABLE_NBYTES.unpack_from(message)[0]
            table = _table(unpack(message[_TABLE_NBYTES.size : end], columns=0)[0])
            numbers = parse_json(unpack(message[end:], columns=5)[0])
            if not isinstance(numbers, list) or [type(number) for number in numbers] != [int, int]:
                raise ValueError("it has no rank")
            rank, count = numbers
            if not (0 <= rank < 2**31 and 0 <= count < 2**31):
                raise ValueError("its rank or its number of rows is out of range")
        except ValueError as error:
            raise _damaged(error) from error
        return cls(rank, count, table, message[end:])

    def rows(self) -> RankRows:
        """Return the rows, unpacked anew each time; raises SaveFailedError where they are damaged."""
        try:
            _, (counts, steps, cells, offsets, lengths) = unpack(self.columns, columns=5)
            ndims, grids = self.table.ndims, self.table.grids
            if counts.size != len(self.leaves) or (counts < 0).any() or (counts > steps.size).any():
                raise ValueError("its counts don't fit its leaves")
            if not int(counts.sum()) == steps.size == self.count or int(counts[grids].sum()) != cells.size:
                raise ValueError("its counts don't fit its rows")
            if not int((counts * ndims)[~grids].sum()) == offsets.size == lengths.size:
                raise ValueError("its counts don't fit its boxes")
        except ValueError as error:
            raise _damaged(error) from error
        return RankRows(self.rank, self.leaves, counts, np.cumsum(steps), cells, offsets, lengths)


def _damaged(error: ValueError) -> SaveFailedError:
    return SaveFailedError(
        f"a rank's table of what it wrote is damaged ({error}); the save was not committed, save again"
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """The leaf table of a message, and of each leaf the number of dimensions and whether it is a grid."""

    leaves: tuple[LeafLayout, ...]
    ndims: Int64s
    grids: NDArray[np.bool_]


# Most ranks send the same table; the stages of a pipeline send some tens of them.
@lru_cache(maxsize=64)
def _table(json_part: bytes) -> _Table:
    table = parse_json(json_part)
    if not isinstance(table, list):
        raise ValueError("its leaf table is no list")
    leaves = tuple(map(layout_from_json, table))
    ndims = np.asarray([len(leaf.shape) for leaf in leaves], np.int64)
    return _Table(leaves, ndims, np.asarray([leaf.chunk_shape is not None for leaf in leaves], np.bool_))
