"""Parameters that MindSpore has split over devices, as parts of whole arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mindspore import nn
from mindspore.communication import get_group_size, get_rank

from ckptengine.errors import StateError
from ckptengine.layout.device_matrix import device_matrix_box
from ckptengine.schema.box import Box
from ckptengine.state.sharded import ShardedArray

__all__ = ["box_of_layout", "sharded_parameters"]

Group = Callable[[str], tuple[int, int]]


def _group(name: str) -> tuple[int, int]:
    return get_group_size(name), get_rank(name)


def box_of_layout(layout: Sequence[Any], rank: int, group: Group = _group) -> tuple[tuple[int, ...], Box]:
    """Return the whole shape of a parameter and the box that a rank holds.

    `layout` is an entry of a compiled network's `parameter_layout_dict`: device matrix, tensor map, slice's shape,
    field size, whether all splits are even, optimizer's sharding group, whole shape. `group` gives the size of such a
    group and this rank's number in it. Raises `StateError` for uneven splits, fields, and slices that are reshaped.
    """
    if len(layout) < 7:
        raise StateError(f"a layout has 7 entries or more, this has {len(layout)}: {list(layout)}")
    matrix, tensor_map, slice_shape, field, even, name, whole = layout[:7]
    if not even or field:
        raise StateError(f"the layout {list(layout)} has an uneven split or a field size, which has no box")
    shards, shard = group(name) if name else (1, 0)
    shape = tuple(whole) or _whole(slice_shape, matrix, tensor_map, shards)
    try:
        box = device_matrix_box(shape, matrix, tensor_map, rank, shards, shard)
    except ValueError as error:
        raise StateError(f"the layout {list(layout)} has no box on rank {rank}: {error}") from None
    if slice_shape and tuple(slice_shape) != box.shape:
        raise StateError(
            f"the layout {list(layout)} reshapes its slice: {tuple(slice_shape)}, where the device matrix gives "
            f"{box.shape}; save with MindSpore's integrated_save for such a parameter"
        )
    return shape, box


def _whole(
    slice_shape: Sequence[int], matrix: Sequence[int], tensor_map: Sequence[Any], shards: int
) -> tuple[int, ...]:
    shape = list(slice_shape)
    for dim, entry in enumerate(tensor_map):
        for place in [entry] if isinstance(entry, int) else entry:
            shape[dim] *= 1 if place == -1 else matrix[len(matrix) - 1 - place]
    if shape:
        shape[0] *= shards
    return tuple(shape)


def sharded_parameters(
    network: nn.Cell, layouts: Mapping[str, Sequence[Any]] | None = None, rank: int | None = None, group: Group = _group
) -> dict[str, Any]:
    """Return a compiled network's parameters by name: those with a layout as `ShardedArray`, the others as they are.

    The dict is a state that can be saved, and loaded with any other layout and number of ranks. `layouts` is by default
    the network's `parameter_layout_dict`, `rank` this rank. Raises `StateError`, naming the parameter, for uneven
    splits, fields, and slices that are reshaped.
    """
    layouts = network.parameter_layout_dict if layouts is None else layouts
    state: dict[str, Any] = {}
    for parameter in network.get_parameters():
        state[parameter.name] = parameter
        layout = layouts.get(parameter.name)
        if layout is None:
            continue
        try:
            shape, box = box_of_layout(layout, get_rank() if rank is None else rank, group)
            state[parameter.name] = ShardedArray(parameter, shape, box.offset)
        except StateError as error:
            raise StateError(f"{parameter.name}: {error}") from None
    return state
