"""Ways to spread a tensor over ranks, and a checkpoint in memory, for the tests of the planning code."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from ckptengine.layout.assign import Assigned, assign, check_own
from ckptengine.layout.holdings import Holding
from ckptengine.layout.merge import merge
from ckptengine.layout.rank_rows import PackedRows, RankRows
from ckptengine.layout.read_plan import Copy
from ckptengine.layout.rows import RowTable
from ckptengine.layout.survey import Table, by_path, decode_boxes, encode_boxes, survey_of, table_of
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import Placement

Sharding = list[list[Box]]  # the boxes of each rank


def chunks(start: int, length: int, parts: int) -> list[tuple[int, int]]:
    """Start and length of each part as torch.chunk cuts: ceil-division, the last ones shorter or empty."""
    step = -(-length // parts) if length else 0
    cuts = [min(length, index * step) for index in range(parts + 1)]
    return [(start + a, b - a) for a, b in itertools.pairwise(cuts)]


def cut(box: Box, dim: int, parts: int) -> list[Box]:
    result = []
    for start, length in chunks(box.offset[dim], box.shape[dim], parts):
        offset, shape = list(box.offset), list(box.shape)
        offset[dim], shape[dim] = start, length
        result.append(Box(tuple(offset), tuple(shape)))
    return result


def kd_split(box: Box, pieces: int, rng: random.Random) -> list[Box]:
    if pieces <= 1 or box.volume <= 1:
        return [box]
    dim = rng.choice([d for d, length in enumerate(box.shape) if length > 1])
    at = rng.randint(1, box.shape[dim] - 1)
    low_shape, high_shape, high_offset = list(box.shape), list(box.shape), list(box.offset)
    low_shape[dim], high_shape[dim] = at, box.shape[dim] - at
    high_offset[dim] += at
    low = Box(box.offset, tuple(low_shape))
    high = Box(tuple(high_offset), tuple(high_shape))
    return kd_split(low, pieces // 2, rng) + kd_split(high, pieces - pieces // 2, rng)


def spread(kind: str, shape: tuple[int, ...], world: int, rng: random.Random) -> Sharding:
    whole = Box.whole(shape)
    if kind == "replicas" or not shape:
        result = [[whole] for _ in range(world)]
    elif kind == "dim0":
        result = [[box] for box in cut(whole, 0, world)]
    elif kind == "dim1":
        result = [[box] for box in cut(whole, min(1, len(shape) - 1), world)]
    elif kind in ("mesh", "nested", "hsdp"):
        rows = rng.choice([n for n in range(1, world + 1) if world % n == 0])
        columns = world // rows
        inner = min(1, len(shape) - 1) if kind == "mesh" else 0
        if kind == "hsdp":
            result = [[box] for box in cut(whole, 0, columns)] * rows
        else:
            result = [[box] for outer in cut(whole, 0, rows) for box in cut(outer, inner, columns)]
    else:
        assert kind == "kd"
        result = [[] for _ in range(world)]
        for box in kd_split(whole, rng.randint(1, 12), rng):
            result[rng.randrange(world)].append(box)
    return [[box for box in boxes if box.volume] for boxes in result]


KINDS = ("replicas", "dim0", "dim1", "mesh", "nested", "hsdp", "kd")

shapes = st.lists(st.one_of(st.integers(0, 13), st.integers(1, 7)), max_size=4).map(tuple)


@st.composite
def shardings(draw: st.DrawFn, shape: tuple[int, ...]) -> Sharding:
    world = draw(st.integers(1, 5))
    return spread(draw(st.sampled_from(KINDS)), shape, world, random.Random(draw(st.integers(0, 2**32))))


def holding(
    path: tuple[str | int, ...],
    shape: tuple[int, ...],
    boxes: Sequence[Box],
    dtype: str = "float32",
    placement: Placement = Placement.SHARDED,
) -> Holding:
    numbers = [
        np.asarray(rows, np.int64).reshape(len(boxes), len(shape))
        for rows in ([box.offset for box in boxes], [box.shape for box in boxes])
    ]
    return Holding(path, dtype, shape, placement, "torch", numbers[0], numbers[1])


def holdings(shape: tuple[int, ...], sharding: Sharding, dtype: str = "float32") -> list[list[Holding]]:
    return [[holding(("w",), shape, boxes, dtype)] for boxes in sharding]


def assign_all(held: Sequence[Sequence[Holding]]) -> list[list[Assigned]]:
    """What each rank is assigned, after an exchange in memory of what all hold."""
    mine = [by_path(of_rank, rank) for rank, of_rank in enumerate(held)]
    for rank, of_rank in enumerate(mine):
        check_own(of_rank, rank)
    said = [table_of(of_rank, rank, len(held)).encode() for rank, of_rank in enumerate(mine)]
    distinct = list(dict.fromkeys(said))
    tables = [Table.decode(table) for table in distinct]
    survey = survey_of(tables, np.asarray([distinct.index(table) for table in said]))
    survey, boxes = decode_boxes(survey, [encode_boxes(survey, of_rank, rank) for rank, of_rank in enumerate(mine)])
    return [assign(survey, boxes, rank, of_rank) for rank, of_rank in enumerate(mine)]


def values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A tensor whose bytes are all different as far as they can be."""
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    raw = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    return raw.view(f"V{DTYPES[dtype].itemsize}").reshape(shape)


def region(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def write(
    assigned: Sequence[Sequence[Assigned]], tensors: dict[tuple[str | int, ...], np.ndarray], gap: int = 0
) -> tuple[RowTable, list[bytes]]:
    """Write each rank's archive as the writer does, dense chunks with zero padding, and merge the rows."""
    archives, tables = [], []
    for rank, leaves in enumerate(assigned):
        image, position = bytearray(), []
        for leaf in leaves:
            for offset, length in zip(leaf.offsets.tolist(), leaf.lengths.tolist(), strict=True):
                dense = leaf.chunk_shape if leaf.chunk_shape is not None else length
                chunk = np.zeros(dense, tensors[leaf.path].dtype)
                chunk[region([0] * len(length), length)] = tensors[leaf.path][region(offset, length)]
                image += b"\xee" * gap
                position.append(len(image))
                image += chunk.tobytes()
        archives.append(bytes(image))
        rows = RankRows.of(rank, leaves, np.asarray(position, np.int64))
        tables.append(PackedRows.decode(rows.encode()))
    return merge(tables[::-1]), archives


def save(shape: tuple[int, ...], sharding: Sharding, dtype: str = "float32") -> tuple[RowTable, list[bytes]]:
    return write(assign_all(holdings(shape, sharding, dtype)), {("w",): values(shape, dtype)}, gap=3)


def perform(copy: Copy, archive: bytes, target: np.ndarray) -> None:
    chunk = np.frombuffer(archive, target.dtype, math.prod(copy.dense_shape), copy.position)
    source = chunk.reshape(copy.dense_shape)[region(copy.box_offset, copy.box_shape)]
    target[region(copy.target_offset, copy.box_shape)] = source


def touched_blocks(copies: Sequence[Copy], block_nbytes: int) -> set[int]:
    """The blocks that hold a byte of a copy's box, found element by element."""
    result: set[int] = set()
    for copy in copies:
        elements = np.arange(math.prod(copy.dense_shape)).reshape(copy.dense_shape)
        starts = elements[region(copy.box_offset, copy.box_shape)].reshape(-1) * copy.itemsize + copy.position
        for byte in range(copy.itemsize):
            result.update(((starts + byte) // block_nbytes).tolist())
    return result
