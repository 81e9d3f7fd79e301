"""Where a rank's slice lies in a tensor that is split over a matrix of devices: MindSpore's way of describing it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptengine.schema.box import Box

__all__ = ["device_matrix_box"]


def device_matrix_box(
    shape: Sequence[int],
    device_matrix: Sequence[int],
    tensor_map: Sequence[int | Sequence[int]],
    rank: int,
    shards: int = 1,
    shard: int = 0,
) -> Box:
    """Return the box of a tensor that a rank holds.

    `shape` is the whole tensor's. Ranks fill the device matrix row by row, the last dimension first. `tensor_map` says
    for each dimension of the tensor along which of the matrix it is split, counted from the matrix's *right* end: 0 is
    its last dimension, -1 means not split; several, outer first, split one dimension one after the other. What an
    optimizer's sharding adds: the slice is cut along its first dimension into `shards`, of which the rank has `shard`.
    This is MindSpore's definition (its documentation of `mindspore.parallel.Layout`, and `_load_tensor_by_layout` of
    MindSpore 2.10). All splits are even.

    Raises `ValueError` naming the dimension and the numbers where a split is not even, or the numbers don't fit.
    """
    count = math.prod(device_matrix)
    if not device_matrix or any(size < 1 for size in device_matrix) or not 0 <= rank < count:
        raise ValueError(f"rank {rank} is not in the device matrix {list(device_matrix)}, which has {count} devices")
    if len(tensor_map) != len(shape):
        raise ValueError(f"the tensor map {list(tensor_map)} does not fit a tensor of shape {tuple(shape)}")
    if shards < 1 or not 0 <= shard < shards:
        raise ValueError(f"shard {shard} of {shards}: shards count from 0")
    coordinates, rest = [0] * len(device_matrix), rank
    for axis in reversed(range(len(device_matrix))):
        rest, coordinates[axis] = divmod(rest, device_matrix[axis])
    used: set[int] = set()
    offset, lengths = [], []
    for dim, (length, entry) in enumerate(zip(shape, tensor_map, strict=True)):
        parts, index = 1, 0
        for place in [entry] if isinstance(entry, int) else entry:
            if place == -1:
                continue
            axis = len(device_matrix) - 1 - place
            if not 0 <= axis < len(device_matrix) or axis in used:
                raise ValueError(
                    f"dimension {dim}: the tensor map {list(tensor_map)} names place {place} of the device matrix "
                    f"{list(device_matrix)}, which {'is used twice' if axis in used else 'it has not'}"
                )
            used.add(axis)
            parts, index = parts * device_matrix[axis], index * device_matrix[axis] + coordinates[axis]
        if dim == 0:
            parts, index = parts * shards, index * shards + shard
        if length % parts:
            raise ValueError(f"dimension {dim} of a tensor of shape {tuple(shape)} can't be split evenly into {parts}")
        offset.append(index * (length // parts))
        lengths.append(length // parts)
    if shards > 1 and not shape:
        raise ValueError("a tensor without dimensions has no shards")
    return Box(tuple(offset), tuple(lengths))
