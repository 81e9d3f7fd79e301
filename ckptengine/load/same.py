"""Whether several leaves of a checkpoint bring the same bytes to memory that they share in a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ckptengine.load.checkpoint import Opened
from ckptengine.load.fill import READ_TIMEOUT, host_memory, plan_filling, read_ranges
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, Part
from ckptengine.state.binding import Read
from ckptengine.state.extents import Extent

__all__ = ["brings_the_same", "stored_parts"]


def brings_the_same(checkpoint: Opened, timeout: float, reads: Sequence[Read], tied: bool) -> bool:
    """Return whether reads don't undo each other, in whatever order they come; reads what they ask for, into copies.

    With `tied`, each is to fill the whole of one tensor; else they fill what their targets say, which overlap.
    """
    stored = [stored_parts(checkpoint, read, read.target, timeout) for read in reads]
    if tied:
        first = reads[0].target
        return all(
            read.target.dtype == first.dtype and all(map(_equal, stored[0], parts))
            for read, parts in zip(reads, stored, strict=True)
        )
    places = [read.places for read in reads]
    spans: dict[str, tuple[int, int]] = {}
    for extent in (one for found in places for one in found):
        low, high = spans.get(extent.space, (extent.low, extent.high))
        spans[extent.space] = min(low, extent.low), max(high, extent.high)
    memories = {space: (low, np.zeros(high - low, np.uint8)) for space, (low, high) in spans.items()}
    views = [[_view(extent, *memories[extent.space]) for extent in found] for found in places]
    for found, parts in zip(views, stored, strict=True):
        for view, part in zip(found, parts, strict=True):
            view[...] = part.view(view.dtype).reshape(view.shape)
    pairs = zip(views, stored, strict=True)
    return all(_equal(v, p) for found, parts in pairs for v, p in zip(found, parts, strict=True))


def stored_parts(
    checkpoint: Opened, read: Read, target: ArrayLeaf, timeout: float = READ_TIMEOUT
) -> list[np.ndarray[Any, Any]]:
    """Return this rank's parts of a leaf as they are stored, one array of its box's shape for each; all verified."""
    dtype = DTYPES[target.dtype].numpy
    arrays = [np.empty(part.box.shape, dtype) for part in target.parts]
    parts = tuple(
        Part(Box(part.box.offset, part.box.shape), host_memory(array))
        for part, array in zip(target.parts, arrays, strict=True)
    )
    leaf = ArrayLeaf(target.path, target.dtype, target.shape, target.placement, parts, "numpy")
    filling = plan_filling(checkpoint, [(checkpoint.rows.index[read.path, read.rank], leaf)])
    read_ranges(filling, filling.needs, timeout)
    filling.finish()
    return arrays


def _view(extent: Extent, low: int, memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(f"V{extent.itemsize}")
    return np.ndarray(extent.shape, dtype, memory, extent.address - low, extent.strides)


def _equal(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()
