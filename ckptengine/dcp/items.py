"""Write items of a save plan as leaves and typed values: what one rank has to write of a state."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ckptengine.errors import StateError
from ckptengine.frameworks.registry import framework
from ckptengine.layout.assign import Assigned
from ckptengine.layout.grid import regular_grid
from ckptengine.layout.tiling import Int64s
from ckptengine.save.values import DIGEST_NBYTES, StoredValues
from ckptengine.schema.box import Box
from ckptengine.schema.head import is_zero_sized, zero_sized_chunk
from ckptengine.schema.leaf import ArrayLeaf, Part, Placement
from ckptengine.schema.path import Path, dotted, path_order
from ckptengine.state.tree import flatten
from ckptengine.state.values import digest, encode

__all__ = ["Values", "assigned_to", "differing", "grids_of", "leaves_of", "merged", "path_of", "values_of"]

Grids = Mapping[str, tuple[int, ...] | None]
_MADE_BY_CODE = ("module", "optimizer", "object")
_MADE_ANEW = ("torch", "numpy")


@dataclass(frozen=True, slots=True)
class Values:
    """Plain values that one rank writes: path and typed value, and path and form of what holds values.

    `objects` are the paths of values that hold more: an array, or a tree that the planner has not flattened. `held` has
    the digests of all plain values that it holds, by name: the planner has one rank write those that several have.
    """

    values: tuple[tuple[Path, Any], ...] = ()
    aliases: tuple[tuple[Path, Path], ...] = ()
    containers: tuple[tuple[Path, Any], ...] = ()
    objects: tuple[Path, ...] = ()
    held: Mapping[str, bytes] = field(default_factory=dict)


def path_of(fqn: str, planner_data: Any) -> Path:
    """Return the path of an item in the nested state; a planner that doesn't flatten has names only."""
    path = planner_data.get(fqn) if isinstance(planner_data, Mapping) else None
    return (fqn,) if path is None else tuple(path)


def grids_of(plans: Iterable[SavePlan]) -> dict[str, tuple[int, ...] | None]:
    """Return for each tensor the chunk shape of the grid that all ranks' pieces make, None where they make none."""
    boxes: dict[str, list[Box]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    itemsizes: dict[str, int] = {}
    for plan in plans:
        for item in plan.items:
            if item.tensor_data is None:
                continue
            name, chunk = item.index.fqn, item.tensor_data.chunk
            shapes[name] = tuple(item.tensor_data.size)
            itemsizes[name] = item.tensor_data.properties.dtype.itemsize
            mine = boxes.setdefault(name, [])
            if 0 not in chunk.sizes:
                mine.append(Box(tuple(chunk.offsets), tuple(chunk.sizes)))
    grids: dict[str, tuple[int, ...] | None] = {}
    for name, of_name in boxes.items():
        shape = shapes[name]
        if is_zero_sized(shape):
            grids[name] = zero_sized_chunk(shape)
        else:
            grids[name] = regular_grid(shape, *_columns(of_name, len(shape)), itemsizes[name])
    return grids


def leaves_of(plan: SavePlan, planner: SavePlanner) -> list[tuple[str, ArrayLeaf]]:
    """Return the tensors that a rank writes, by name, each with the pieces that are this rank's.

    Raises `StateError` naming what can't be saved.
    """
    adapter = framework("torch")
    heads: dict[str, tuple[str, tuple[int, ...], Placement]] = {}
    parts: dict[str, list[Part]] = {}
    for item in plan.items:
        if item.type is WriteItemType.BYTE_IO:
            continue
        name = item.index.fqn
        tensor, box, shape = _tensor(item, planner)
        path = path_of(name, plan.planner_data)
        if adapter.is_wrapped(tensor):
            raise StateError(
                f"{name}: {type(tensor).__name__} is made of other tensors, for which torch's planner has no items; "
                "save it with ckptengine.save, which keeps them"
            )
        view = adapter.view(tensor, path, target=False)
        placement = Placement.REPLICATED if item.type is WriteItemType.TENSOR else Placement.SHARDED
        head = (view.dtype, shape, placement)
        if heads.setdefault(name, head) != head:
            raise StateError(f"{name}: its pieces differ: {heads[name]} and {head}; give all the same dtype and shape")
        mine = parts.setdefault(name, [])
        mine += [Part(box, part.memory) for part in view.parts]
    return [
        (name, ArrayLeaf(path_of(name, plan.planner_data), *heads[name], tuple(mine), "torch"))
        for name, mine in parts.items()
    ]


def assigned_to(rank: int, leaves: Sequence[tuple[str, ArrayLeaf]], grids: Grids) -> list[Assigned]:
    """Return what a rank writes, sorted by path: all that it has, since the planner has left out the replicas."""
    result = []
    for name, leaf in leaves:
        order = sorted(range(len(leaf.parts)), key=lambda number, leaf=leaf: leaf.parts[number].box.offset)  # type: ignore[misc]
        offsets, lengths = _columns([leaf.parts[number].box for number in order], len(leaf.shape))
        grid = grids.get(name)
        if is_zero_sized(leaf.shape):
            grid = zero_sized_chunk(leaf.shape)
        writes = is_zero_sized(leaf.shape) or bool(order)
        if not writes:
            continue
        fragments = () if grid is not None else tuple(f"r{rank}-{number}" for number in range(len(order)))
        head = (leaf.path, leaf.dtype, leaf.shape, leaf.placement, leaf.container)
        result.append(Assigned(*head, grid, writes, offsets, lengths, fragments))
    result.sort(key=lambda one: path_order(one.path))
    for before, after in itertools.pairwise(result):
        if before.path == after.path:
            raise StateError(f"{dotted(after.path)}: the plan has it twice; give each tensor a name of its own")
    return result


def values_of(plan: SavePlan, planner: SavePlanner) -> tuple[Values, list[tuple[str, ArrayLeaf]]]:
    """Return the plain values that a rank writes, and the tensors that lie inside them, such as in a tuple.

    Raises `StateError` naming what typed values can't hold: nothing is pickled.
    """
    values: list[tuple[Path, Any]] = []
    aliases: list[tuple[Path, Path]] = []
    containers: list[tuple[Path, Any]] = []
    objects: list[Path] = []
    leaves: list[tuple[str, ArrayLeaf]] = []
    for item in plan.items:
        if item.type is not WriteItemType.BYTE_IO:
            continue
        path = path_of(item.index.fqn, plan.planner_data)
        value = _object(item, planner)
        flat = flatten({"": value})
        code = [one for one in flat.outline.containers if one.kind in _MADE_BY_CODE]
        if code or flat.rank_values or any(leaf.placement is Placement.PER_RANK for leaf in flat.arrays):
            what = code[0].cls or code[0].kind if code else "PerRank"
            raise StateError(
                f"{item.index.fqn}: {what} is neither a tensor nor a plain value, and nothing is pickled: put its "
                "`state_dict()` in its place, or give it to torch as a `Stateful` at the top of the state"
            )
        _check_containers(item.index.fqn, flat.arrays)
        if flat.arrays or isinstance(value, Mapping) or list(flat.values) != [("",)]:
            objects.append(path)
        # The empty key stands for the item itself.
        values += [((*path, *own[1:]), encode(one, (*path, *own[1:]))) for own, one in flat.values.items()]
        aliases += [((*path, *own[1:]), (*path, *first[1:])) for own, first in flat.aliases.items()]
        containers += [((*path, *own[1:]), form) for own, form in flat.containers.items()]
        for leaf in flat.arrays:
            where = (*path, *leaf.path[1:])
            moved = ArrayLeaf(where, leaf.dtype, leaf.shape, leaf.placement, leaf.parts, leaf.container)
            leaves.append((dotted(where), moved))
    containers += _lists_of(path_of(item.index.fqn, plan.planner_data) for item in plan.items)
    return Values(tuple(values), tuple(aliases), tuple(containers), tuple(objects), _held(planner)), leaves


def merged(of_ranks: Sequence[Values]) -> StoredValues:
    """Return all ranks' plain values as rank 0 stores them; what several have is stored once."""
    values: dict[Path, Any] = {}
    aliases: dict[Path, Path] = {}
    containers: dict[Path, Any] = {}
    objects: dict[Path, None] = {}
    for one in of_ranks:
        values |= one.values
        aliases |= one.aliases
        containers |= one.containers
        objects |= dict.fromkeys(one.objects)
    ordered = sorted(values.items(), key=lambda item: path_order(item[0]))
    return StoredValues(
        shared={
            "values": [[list(path), value] for path, value in ordered],
            "aliases": [[list(path), list(first)] for path, first in aliases.items()],
            "containers": [[list(path), form] for path, form in containers.items()],
            "objects": [list(path) for path in objects],
        },
        own={"values": [], "containers": []},
        paths=tuple(path for path, _ in ordered),
        digests=b"".join(digest([list(path), value])[:DIGEST_NBYTES] for path, value in ordered),
    )


def differing(of_ranks: Sequence[Values]) -> list[str]:
    """Return the names of plain values that are not the same on all ranks that hold them."""
    digests: dict[str, bytes] = {}
    return sorted(
        {name for one in of_ranks for name, said in one.held.items() if digests.setdefault(name, said) != said}
    )


def _check_containers(name: str, arrays: Iterable[ArrayLeaf]) -> None:
    """Raise `StateError` for arrays that a planner has no tensors for, and that a load could not make anew."""
    for leaf in arrays:
        if leaf.container not in _MADE_ANEW:
            raise StateError(
                f"{name}: an array of {leaf.container} can't be loaded by torch's planners; convert it to a tensor or "
                "a numpy array"
            )


def _held(planner: SavePlanner) -> dict[str, bytes]:
    if not isinstance(planner, DefaultSavePlanner):
        return {}
    held = {}
    for name, value in planner.state_dict.items():
        if not isinstance(value, torch.Tensor):
            with contextlib.suppress(StateError):  # it holds tensors, or is refused by whoever writes it
                held[name] = digest(encode(value, (name,)))[:DIGEST_NBYTES]
    return held


def _tensor(item: WriteItem, planner: SavePlanner) -> tuple[torch.Tensor, Box, tuple[int, ...]]:
    """Return the tensor of an item, the box of the whole that it is, and the shape of the whole."""
    name, data = item.index.fqn, item.tensor_data
    if data is None:
        raise StateError(f"{name}: the plan has a tensor without its shape (`tensor_data`); the planner has to give it")
    tensor = planner.resolve_data(item)
    if not isinstance(tensor, torch.Tensor):
        raise StateError(f"{name}: the planner gave {type(tensor).__name__} in place of a tensor")
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    if tuple(tensor.shape) != box.shape:
        raise StateError(f"{name}: the plan has a piece of shape {box.shape}, the planner gave {tuple(tensor.shape)}")
    return tensor.detach(), box, tuple(data.size)


def _object(item: WriteItem, planner: SavePlanner) -> Any:
    """Return a plain value; a planner that gives it as bytes of its own is read by torch's restricted reader."""
    if isinstance(planner, DefaultSavePlanner) and all(
        getattr(type(planner), call) is getattr(DefaultSavePlanner, call)
        for call in ("resolve_data", "transform_object")
    ):
        return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    if not isinstance(data, io.BytesIO):
        raise StateError(f"{item.index.fqn}: the planner gave {type(data).__name__} in place of bytes")
    data.seek(0)
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:
        raise StateError(
            f"{item.index.fqn}: the planner's bytes hold more than tensors and plain values, and nothing is pickled: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _lists_of(paths: Iterable[Path]) -> list[tuple[Path, Any]]:
    """Return the paths of lists: torch's planner numbers their items, and makes the keys of dicts strings."""
    found = {path[:depth]: "list" for path in paths for depth in range(1, len(path)) if isinstance(path[depth], int)}
    return list(found.items())


def _columns(boxes: Sequence[Box], ndim: int) -> tuple[Int64s, Int64s]:
    offsets = np.asarray([box.offset for box in boxes], np.int64).reshape(len(boxes), ndim)
    lengths = np.asarray([box.shape for box in boxes], np.int64).reshape(len(boxes), ndim)
    return offsets, lengths
