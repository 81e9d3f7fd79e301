"""Which boxes of the global tensor a rank's DTensor holds, on any mesh."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ckptengine.errors import StateError
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, dotted

__all__ = ["Split", "coordinate_in", "dtensor_pieces", "is_dtensor", "local_runs", "row_runs", "splits_of"]

Run = tuple[int, int]
"""Start and length, in elements, of indices that follow each other."""

_coordinates: Any = WeakIdKeyDictionary()
"""What `coordinate_in` has found out of each mesh."""


@dataclass(frozen=True, slots=True)
class Split:
    """One division of a dimension: into `size` parts, of which this rank has number `coordinate`.

    `factor` is `_StridedShard`'s split factor, 1 for `Shard`.
    """

    size: int
    coordinate: int
    factor: int


def is_dtensor(tensor: Any) -> bool:
    """Whether a value is a DTensor; imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def dtensor_pieces(tensor: Any, path: Path) -> tuple[tuple[int, ...], Placement, list[tuple[Box, torch.Tensor]]]:
    """Return global shape, placement, and this rank's boxes, each with its view of the local tensor.

    Raises `StateError` naming the path for `Partial`, for placements that are unknown, and where the local
    tensor does not have the shape that its placements give.
    """
    mesh = tensor.device_mesh
    shape = tuple(tensor.shape)
    with torch.no_grad():
        local = tensor.to_local()
    coordinate = coordinate_in(mesh)
    splits = splits_of(tensor.placements, tuple(mesh.shape), coordinate, len(shape), path)
    everywhere = mesh.size() == torch.distributed.get_world_size()
    placement = Placement.SHARDED if any(splits) or not everywhere else Placement.REPLICATED
    if coordinate is None:
        return shape, placement, []
    if 0 in shape and 0 in local.shape:
        return shape, placement, []  # FSDP2 gives every rank no rows of what has no elements
    runs = [
        local_runs(length, dim_splits, local_length)
        for length, dim_splits, local_length in zip(shape, splits, local.shape, strict=True)
    ]
    expected = tuple(None if dim is None else sum(length for _, length in dim) for dim in runs)
    if expected != tuple(local.shape):
        raise StateError(
            f"{dotted(path)}: the local tensor of shape {tuple(local.shape)} does not fit the placements "
            f"{tensor.placements} of a tensor of shape {shape} on a mesh of shape {tuple(mesh.shape)}; "
            "distribute it with `distribute_tensor` or `fully_shard`, or use ShardedArray"
        )
    return shape, placement, _cut(local, [dim for dim in runs if dim is not None])


def row_runs(tensor: Any, path: Path) -> list[Run] | None:
    """Return the runs of global rows that this rank's local tensor holds; None where every rank holds the whole.

    Raises `StateError` naming the path where the tensor is cut along another dimension than the first, lies on a mesh
    of some ranks only, or is `Partial`.
    """
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    coordinate = coordinate_in(mesh)
    splits = splits_of(tensor.placements, tuple(mesh.shape), coordinate, len(shape), path)
    if coordinate is None or any(splits[1:]) or mesh.size() != torch.distributed.get_world_size():
        raise StateError(
            f"{dotted(path)}: a DTensor of {type(tensor._local_tensor).__name__} must be cut along its first "
            f"dimension, over all ranks; it has the placements {tensor.placements} on a mesh of {tuple(mesh.shape)}"
        )
    if not any(splits):
        return None
    return local_runs(shape[0], splits[0], tensor._local_tensor.shape[0]) or []


def coordinate_in(mesh: Any) -> list[int] | None:
    """Return which part of each mesh dimension this rank has; None where it is not in the mesh.

    torch hands out parts, and gathers them, by the ranks in a dimension's process group, which ascend whatever the
    order in the mesh (torch 2.13: `new_group` sorts them). `get_coordinate` counts in the order of the mesh.
    """
    if mesh in _coordinates:  # it takes longer to find out than all else of a DTensor, and thousands have one mesh
        known: list[int] | None = _coordinates[mesh]
        return known
    coordinate = mesh.get_coordinate()
    found = None if coordinate is None else _by_groups(mesh, list(coordinate))
    _coordinates[mesh] = found
    return found


def _by_groups(mesh: Any, coordinate: list[int]) -> list[int]:
    found = list(coordinate)
    for dim in range(mesh.ndim):
        place = tuple(slice(None) if other == dim else at for other, at in enumerate(coordinate))
        ranks = mesh.mesh[place].tolist()
        if ranks != sorted(ranks):
            found[dim] = mesh.get_local_rank(dim)
    return found


def splits_of(
    placements: Sequence[Any],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int] | None,
    ndim: int,
    path: Path,
) -> list[list[Split]]:
    """Return, for each dimension of the tensor, its divisions in the order of the mesh's dimensions."""
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    splits: list[list[Split]] = [[] for _ in range(ndim)]
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise StateError(
                f"{dotted(path)}: a DTensor with the placement {placement} holds no part of the result yet; "
                "`redistribute` it to Shard or Replicate before saving"
            )
        factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        at = 0 if coordinate is None else coordinate[mesh_dim]
        splits[placement.dim].append(Split(mesh_shape[mesh_dim], at, factor))
    return splits


def local_runs(length: int, splits: Sequence[Split], local_length: int) -> list[Run] | None:
    """Return the runs of global indices that a rank holds along one dimension, in the order of its local
    tensor.

    Takes the dimension's global length, its divisions in mesh order, and its local length. None means that
    the local length fits neither reading of the placements:

    - torch's definition (`_StridedShard._split_tensor`, torch 2.13) divides from left to right;
    - `fully_shard` over a tensor-parallel mesh divides in the order that the split factors stand for, the
      tensor-parallel dimension first, which differs where the sizes are uneven (7 rows on 3×2).

    Where both fit and differ, it is the second: nothing but `fully_shard` makes such placements.
    """
    if all(split.factor == 1 for split in splits):
        runs = _left_to_right(length, splits)
        return runs if _total(runs) == local_length else None
    order = _order(splits)
    if order is not None:
        start, rest = 0, length
        for index in order:
            offset, rest = _chunk(rest, splits[index].size, splits[index].coordinate)
            start += offset
        if rest == local_length:
            return [(start, rest)] if rest else []
    runs = _left_to_right(length, splits)
    return runs if _total(runs) == local_length else None


def _order(splits: Sequence[Split]) -> list[int] | None:
    """Return the order of division that the factors stand for: each is the product of the sizes before."""
    order: list[int] = []
    for index in reversed(range(len(splits))):
        for position in range(len(order) + 1):
            if math.prod(splits[i].size for i in order[:position]) == splits[index].factor:
                order.insert(position, index)
                break
        else:
            return None
    return order


def _left_to_right(length: int, splits: Sequence[Split]) -> list[Run]:
    runs: list[Run] = [(0, length)]
    for split in splits:
        total, chosen = _total(runs), []
        for piece in range(split.factor):
            start, size = _chunk(total, split.factor, piece)
            offset, size = _chunk(size, split.size, split.coordinate)
            chosen += _narrow(runs, start + offset, size)
        runs = _merge(chosen)
    return runs if length else []


def _chunk(length: int, parts: int, index: int) -> Run:
    """Return start and length of one of `torch.chunk`'s parts; the last ones may be empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


def _narrow(runs: Sequence[Run], start: int, length: int) -> list[Run]:
    """Return the runs that elements `start` to `start + length` of their concatenation lie in."""
    chosen, position = [], 0
    for run_start, run_length in runs:
        low, high = max(start, position), min(start + length, position + run_length)
        if low < high:
            chosen.append((run_start + low - position, high - low))
        position += run_length
    return chosen


def _merge(runs: Sequence[Run]) -> list[Run]:
    merged: list[Run] = []
    for start, length in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged


def _total(runs: Sequence[Run]) -> int:
    return sum(length for _, length in runs)


def _cut(local: torch.Tensor, runs: Sequence[Sequence[Run]]) -> list[tuple[Box, torch.Tensor]]:
    """Return a box for each combination of runs, with its view of the local tensor."""
    if local.numel() == 0:
        return []
    pieces = []
    for combination in itertools.product(*(list(enumerate(dim)) for dim in runs)):
        view = local.detach()
        for dim, (number, (_, length)) in enumerate(combination):
            if length != local.shape[dim]:
                view = view.narrow(dim, _total(runs[dim][:number]), length)
        box = Box(tuple(run[0] for _, run in combination), tuple(run[1] for _, run in combination))
        pieces.append((box, view))
    return pieces
