"""The copy: what each chunk of an image is filled from, as a table for the C code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine import _native
from ckptengine.archive.image import BLOCK_NBYTES, Chunk, Image
from ckptengine.errors import StateError
from ckptengine.layout.box import Box
from ckptengine.snapshot.arena import Arena
from ckptengine.state.dtypes import DTYPES
from ckptengine.state.leaf import ArrayLeaf, DeviceMemory, HostMemory, Part, dotted

__all__ = ["Checksums", "copy_threads", "snapshot"]


@dataclass(frozen=True, slots=True)
class Checksums:
    """CRC32s of a filled image: of each chunk, and of each block of the fixed region (uint32, 1-D)."""

    entries: NDArray[np.uint32]
    blocks: NDArray[np.uint32]


def copy_threads() -> int:
    """Return how many threads copy: `CKPTENGINE_THREADS`, else the cores of this process, at most 8.

    More than a few threads saturate the memory of one socket, and the ranks of a node share it.
    """
    given = os.environ.get("CKPTENGINE_THREADS")
    if given:
        return max(1, int(given))
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(8, cores // max(1, ranks)))


def snapshot(image: Image, leaves: Sequence[ArrayLeaf], arena: Arena) -> Checksums:
    """Fill the arena with the image's fixed region and return its checksums.

    `leaves` are the leaves to which the image's chunks refer, by number. The arena must have been reserved.
    """
    if arena.contents is not image:
        for position, data in image.static:
            arena.view(position, len(data))[:] = data
        arena.contents = image
    sources = [_source(chunk, leaves[chunk.leaf]) for chunk in image.chunks]
    table: list[int] = []
    index = [0]
    for chunk, (part, box), (_, _, piece, _) in zip(image.chunks, sources, image.extents.tolist(), strict=True):
        table += _op(chunk, leaves[chunk.leaf], part, box, piece, arena)
        index.append(len(table))
    pieces = np.zeros(image.pieces, np.uint32)
    threads = copy_threads()
    _native.pack(
        arena.address,
        image.fixed_nbytes,
        np.array(table, np.int64),
        np.array(index, np.int64),
        BLOCK_NBYTES,
        pieces,
        threads,
    )
    entries = np.zeros(len(image.chunks), np.uint32)
    blocks = np.zeros(image.blocks, np.uint32)
    _native.seal(
        arena.address,
        image.fixed_nbytes,
        image.extents,
        BLOCK_NBYTES,
        pieces,
        entries,
        blocks,
        threads,
    )
    return Checksums(entries, blocks)


def _source(chunk: Chunk, leaf: ArrayLeaf) -> tuple[Part, Box]:
    """Return the part of a leaf that holds a chunk, and the chunk's box within it."""
    for part in leaf.parts:
        start = tuple(c - p for c, p in zip(chunk.box.offset, part.box.offset, strict=True))
        if all(
            s >= 0 and s + length <= have
            for s, length, have in zip(start, chunk.box.shape, part.box.shape, strict=True)
        ):
            return part, Box(start, chunk.box.shape)
    raise StateError(f"{dotted(leaf.path)}: no memory of this rank holds its planned box {chunk.box}")


def _op(chunk: Chunk, leaf: ArrayLeaf, part: Part, box: Box, piece: int, arena: Arena) -> list[int]:
    """Return one operation of `_native.pack`."""
    itemsize = DTYPES[leaf.dtype].itemsize
    head = [chunk.position, chunk.nbytes, piece, itemsize, len(chunk.dense_shape)]
    if isinstance(part.memory, HostMemory):
        memory = part.memory
        address = memory.address + sum(o * s for o, s in zip(box.offset, memory.strides, strict=True))
        return [*head, address, memory.low, memory.nbytes, *chunk.dense_shape, *box.shape, *memory.strides]
    _copy_from_device(chunk, leaf, part.memory, part, box, arena)
    zeros = (0,) * len(chunk.dense_shape)
    return [*head, 0, 0, 0, *chunk.dense_shape, *box.shape, *zeros]


def _copy_from_device(chunk: Chunk, leaf: ArrayLeaf, memory: DeviceMemory, part: Part, box: Box, arena: Arena) -> None:
    """Copy a chunk that the CPU can't address into its place; the C code then only checksums it."""
    dtype = DTYPES[leaf.dtype].numpy
    dense: NDArray[Any] = np.frombuffer(arena.view(chunk.position, chunk.nbytes), dtype).reshape(chunk.dense_shape)
    corner = dense[tuple(slice(0, length) for length in box.shape)]
    if corner.size != dense.size:
        dense[...] = 0
    if box.shape == part.box.shape:
        memory.copy_to_host(corner)
        return
    whole = np.empty(part.box.shape, dtype)
    memory.copy_to_host(whole)
    corner[...] = whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
