"""The tables of operations that the C code reads, as `_native.pyi` describes them: rows are written here only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOTHING", "CopyPlan", "Row", "ScatterPlan", "copy_row", "scatter_row"]

Int64s = NDArray[np.int64]
Row = tuple[int, ...]

_SOURCE = slice(5, 8)  # where a row of a CopyPlan has its source: address, low, nbytes


@dataclass(frozen=True, slots=True)
class _Plan:
    """Operations of one call of the C code: `ops` (int64, flat), `index` where each begins."""

    ops: Int64s
    index: Int64s

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """Return the plan of rows, each from the function that makes those of this kind."""
        ops: list[int] = []
        index = [0]
        for row in rows:
            ops += row
            index.append(len(ops))
        return cls(np.array(ops, np.int64), np.array(index, np.int64))


class CopyPlan(_Plan):
    """Operations of `_native.pack`, from tensors into an image; `copy_row` makes the rows."""

    __slots__ = ()

    def replace(self, number: int, row: Row) -> None:
        """Take another row of the same length in place of one."""
        self.ops[self.index[number] : self.index[number + 1]] = row

    def set_source(self, number: int, address: int, nbytes: int) -> None:
        """Fill a row's box from elsewhere, with the strides as they are; address 0: the bytes are in the image."""
        self.ops[self.index[number] : self.index[number + 1]][_SOURCE] = address, address, nbytes


def copy_row(
    position: int,
    nbytes: int,
    first_crc: int,
    itemsize: int,
    source: tuple[int, int, int],
    dense_shape: Sequence[int],
    box_shape: Sequence[int],
    strides: Sequence[int],
) -> Row:
    """Return one operation: a box of memory becomes the corner of a dense array, the rest of which is zero.

    `position` and `nbytes` are those of the dense array in the image, `first_crc` the place of the CRC of its first
    piece. `source` are the address of the box's element 0, and the start and the bytes of the memory that it lies in.
    """
    return (position, nbytes, first_crc, itemsize, len(dense_shape), *source, *dense_shape, *box_shape, *strides)


class ScatterPlan(_Plan):
    """Operations of `_native.load`, `scatter` and `share_consume`, from a file into memory.

    `scatter_row` makes the rows, which are in the order of their positions.
    """

    __slots__ = ()

    @classmethod
    def of_bytes(cls, positions: Int64s, sizes: Int64s, addresses: Int64s) -> ScatterPlan:
        """Return the plan of plain bytes of several places, which ascend, that go to as many addresses."""
        zero, one = np.zeros_like(sizes), np.ones_like(sizes)
        columns = [positions, sizes, one, one, addresses, addresses, sizes, sizes, zero, sizes, one]
        return cls(np.stack(columns, axis=1).reshape(-1), np.arange(sizes.size + 1) * len(columns))


def scatter_row(
    position: int,
    nbytes: int,
    itemsize: int,
    target: tuple[int, int, int],
    dense_shape: Sequence[int],
    box_offset: Sequence[int],
    box_shape: Sequence[int],
    strides: Sequence[int],
) -> Row:
    """Return one operation: a box of a dense array at a position of the file goes to memory.

    `target` are the address of the box's element 0, and the start and the bytes of the memory that it lies in.
    """
    return (position, nbytes, itemsize, len(dense_shape), *target, *dense_shape, *box_offset, *box_shape, *strides)


NOTHING = ScatterPlan(np.zeros(0, np.int64), np.zeros(1, np.int64))
"""Bytes are read and verified, and go nowhere."""
