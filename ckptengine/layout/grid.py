"""Regular grids: when a leaf's boxes are exactly the chunks of one Zarr array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ckptengine.layout.tiling import Int64s, inside, linear
from ckptengine.schema.head import is_zero_sized, zero_sized_chunk

__all__ = ["cell_boxes", "cell_counts", "cell_index", "cells_of", "padding_is_acceptable", "regular_grid"]

_PADDING_SHARE = 0.25
_PADDING_NBYTES = 1 << 20


def regular_grid(shape: Sequence[int], offsets: Int64s, lengths: Int64s, itemsize: int = 1) -> tuple[int, ...] | None:
    """Return the chunk shape under which these boxes are a leaf's chunks, or None: then they are fragments.

    `offsets` and `lengths` are int64 [n, ndim], equal boxes allowed. The distinct ones must be all cells of
    one grid over `shape`, each of full chunk length but the last in each dimension, which may be shorter.
    None too where the chunks' padding is not acceptable. A leaf without elements has no boxes and chunks of
    max(1, length).
    """
    chunk = cells_of(shape, offsets, lengths)
    return chunk if chunk is not None and padding_is_acceptable(shape, chunk, itemsize) else None


def cells_of(shape: Sequence[int], offsets: Int64s, lengths: Int64s) -> tuple[int, ...] | None:
    """Return the chunk shape as `regular_grid` does, however much padding the chunks need."""
    shape = tuple(shape)
    if is_zero_sized(shape):
        return None if offsets.shape[0] else zero_sized_chunk(shape)
    if not offsets.shape[0] or not inside(shape, offsets, lengths).all():
        return None
    limit = np.asarray(shape, np.int64)
    chunk = lengths.max(axis=0)
    if (offsets % chunk).any() or (lengths != np.minimum(chunk, limit - offsets)).any():
        return None
    cells = -(-limit // chunk)
    total = math.prod(cells.tolist())
    # A set of more cells than boxes can't be complete: no need to number them.
    if total > offsets.shape[0] or np.unique(linear(cells.tolist(), offsets // chunk)).size != total:
        return None
    return tuple(chunk.tolist())


def padding_is_acceptable(shape: Sequence[int], chunk: Sequence[int], itemsize: int) -> bool:
    """Return whether the zeros that edge chunks are padded with are few: at most 25 % of the leaf, or 1 MiB.

    Zarr wants every chunk at full size, so that 3 rows in chunks of 2 take the room of 4, in the arena, on
    the disk and on the wire. A grid that any Zarr reader sees as one array is worth a little of that, not a
    second copy of a large tensor; below 1 MiB the one array is worth more than the bytes.
    """
    held = math.prod(shape)
    dense = math.prod(-(-length // step) * step for length, step in zip(shape, chunk, strict=True))
    padding = (dense - held) * itemsize
    return padding <= max(_PADDING_SHARE * held * itemsize, _PADDING_NBYTES)


def cell_index(offset: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """Return the index of the chunk that starts at this offset, as it stands in its Zarr key."""
    return tuple(int(o) // int(c) for o, c in zip(offset, chunk, strict=True))


def cell_counts(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """Return how many cells a grid has in each dimension; none where the tensor has no elements."""
    return tuple(-(-length // step) for length, step in zip(shape, chunk, strict=True))


def cell_boxes(shape: Sequence[int], chunk: Sequence[int], cells: Int64s) -> tuple[Int64s, Int64s]:
    """Return offsets and lengths, int64 [n, ndim], of cells given by their numbers in C order (int64 [n])."""
    counts = np.asarray(cell_counts(shape, chunk), np.int64)
    offsets = np.empty((cells.size, counts.size), np.int64)
    rest = cells
    for dim in reversed(range(counts.size)):
        rest, offsets[:, dim] = np.divmod(rest, counts[dim])
    step = np.asarray(chunk, np.int64)
    offsets *= step
    return offsets, np.minimum(step, np.asarray(shape, np.int64) - offsets)
