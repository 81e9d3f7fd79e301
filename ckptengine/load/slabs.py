"""Leaves read in parts of bounded size, each one piece of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ckptengine.load.checkpoint import Opened
from ckptengine.load.fill import host_memory, plan_filling, read_ranges
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part

__all__ = ["read_boxes", "slabs"]


def slabs(shape: tuple[int, ...], most: int) -> Iterator[Box]:
    """Yield boxes of at most `most` elements that make up a tensor, each one piece of it in C order, in that order."""
    if 0 in shape:
        return
    if math.prod(shape) <= most:
        yield Box.whole(shape)
        return
    inner = math.prod(shape[1:])
    if inner <= most:
        rows = most // inner
        for begin in range(0, shape[0], rows):
            count = min(rows, shape[0] - begin)
            yield Box((begin, *(0,) * (len(shape) - 1)), (count, *shape[1:]))
        return
    for row in range(shape[0]):
        for box in slabs(shape[1:], most):
            yield Box((row, *box.offset), (1, *box.shape))


def read_boxes(checkpoint: Opened, wanted: Sequence[tuple[int, Box, NDArray[np.uint8]]], timeout: float) -> None:
    """Read boxes of leaves, given by their numbers in the checkpoint, each into contiguous memory, in C order.

    Every byte is verified, as far as the checkpoint has checksums. Raises `CheckpointDamagedError`, `DeadlineError`.
    """
    reads = []
    for number, box, memory in wanted:
        record = checkpoint.rows.leaves[number]
        strides = tuple(record.itemsize * math.prod(box.shape[dim + 1 :]) for dim in range(len(box.shape)))
        host = host_memory(memory)
        part = Part(box, HostMemory(host.address, strides, host.low, host.nbytes, memory))
        leaf = ArrayLeaf(record.path, record.dtype, record.shape, record.placement, (part,), "numpy")
        reads.append((number, leaf))
    filling = plan_filling(checkpoint, reads)
    read_ranges(filling, filling.needs, timeout)
    filling.finish()
