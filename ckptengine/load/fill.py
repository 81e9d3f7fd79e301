"""From the files into memory: which bytes to read, and where each goes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.layout.read_plan import Copy, WantedPart, blocks, plan_read
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.state.dtypes import DTYPES
from ckptengine.state.leaf import ArrayLeaf, DeviceMemory, HostMemory

__all__ = ["fill", "host_memory"]


def host_memory(array: NDArray[Any]) -> HostMemory:
    """Return a numpy array's memory; the array must be contiguous."""
    return HostMemory(array.ctypes.data, array.strides, array.ctypes.data, array.nbytes, array)


def fill(checkpoint: Checkpoint, reads: Sequence[tuple[int, ArrayLeaf]]) -> int:
    """Fill this rank's parts of leaves from a checkpoint, and return the bytes read.

    `reads` are pairs of a leaf's number in the checkpoint's rows and the leaf of the state that it fills. Every byte
    is verified before it is used. Raises `CheckpointDamagedError` naming the file and the place, or the leaf that
    the layout does not cover; some parts may then have been filled.
    """
    wanted: list[WantedPart] = []
    memories: list[HostMemory] = []
    finish: list[Callable[[], None]] = []
    for leaf, target in reads:
        dtype = DTYPES[target.dtype].numpy
        for part in target.parts:
            memory = part.memory
            if isinstance(memory, DeviceMemory):
                staging = np.empty(part.box.shape, dtype)
                finish.append(functools.partial(memory.copy_from_host, staging))
                memory = host_memory(staging)
            wanted.append(WantedPart(leaf, part.box))
            memories.append(memory)
    total = 0
    for number, copies in sorted(plan_read(checkpoint.rows, wanted).items()):
        archive = checkpoint.archive(number)
        spans = blocks(copies, BLOCK_NBYTES, archive.fixed_nbytes)
        ranges = np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)
        ops, index = _table(copies, memories)
        archive.load(ranges, ops, index)
        total += int(ranges[:, 1].sum())
    for copy in finish:
        copy()
    return total


def _table(copies: Sequence[Copy], memories: Sequence[HostMemory]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the operations of `_native.load`, and where each begins."""
    table: list[int] = []
    index = [0]
    for copy in copies:
        memory = memories[copy.part]
        address = memory.address + sum(o * s for o, s in zip(copy.target_offset, memory.strides, strict=True))
        table += (
            copy.position,
            copy.nbytes,
            copy.itemsize,
            len(copy.dense_shape),
            address,
            memory.low,
            memory.nbytes,
        )
        table += (*copy.dense_shape, *copy.box_offset, *copy.box_shape, *memory.strides)
        index.append(len(table))
    return np.array(table, np.int64), np.array(index, np.int64)
