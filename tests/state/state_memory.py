"""A checkpoint in memory: enough of one to show that what is bound to it comes back."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, DeviceMemory, HostMemory, Part, Placement
from ckptengine.schema.path import Path
from ckptengine.state.bind import LoadReport, Saved, SavedLeaf, bind
from ckptengine.state.tree import flatten
from ckptengine.state.values import decode, encode


@dataclass(frozen=True)
class Stored:
    saved: Saved
    arrays: dict[tuple[Path, int | None], np.ndarray[Any, Any]]


def memory_view(memory: HostMemory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return host memory as an array; numpy checks that it stays inside of the extent."""
    extent = (ctypes.c_char * memory.nbytes).from_address(memory.low)
    return np.ndarray(shape, dtype, extent, memory.address - memory.low, memory.strides)


def read_part(part: Part, dtype: str) -> np.ndarray[Any, Any]:
    if isinstance(part.memory, DeviceMemory):
        result = np.empty(part.box.shape, DTYPES[dtype].numpy)
        part.memory.copy_to_host(result)
        return result
    return memory_view(part.memory, part.box.shape, DTYPES[dtype].numpy).copy()


def write_part(part: Part, dtype: str, values: np.ndarray[Any, Any]) -> None:
    if isinstance(part.memory, DeviceMemory):
        part.memory.copy_from_host(np.ascontiguousarray(values).reshape(part.box.shape))
    else:
        memory_view(part.memory, part.box.shape, DTYPES[dtype].numpy)[...] = values


def region(part: Part) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(part.box.offset, part.box.shape, strict=True))


def save(*states: Mapping[str, Any]) -> Stored:
    """Return the checkpoint of one state for each rank."""
    flats = [flatten(state) for state in states]
    arrays: dict[tuple[Path, int | None], np.ndarray[Any, Any]] = {}
    leaves: dict[Path, SavedLeaf] = {}
    own: list[dict[Path, SavedLeaf]] = [{} for _ in flats]
    for rank, flat in enumerate(flats):
        for leaf in flat.arrays:
            per_rank = leaf.placement is Placement.PER_RANK
            record = SavedLeaf(leaf.dtype, leaf.shape, leaf.placement, leaf.container)
            (own[rank] if per_rank else leaves)[leaf.path] = record
            key = (leaf.path, rank if per_rank else None)
            whole = arrays.setdefault(key, np.zeros(leaf.shape, DTYPES[leaf.dtype].numpy))
            for part in leaf.parts:
                whole[region(part)] = read_part(part, leaf.dtype)
    saved = Saved(
        world_size=len(flats),
        leaves=leaves,
        values=_through_json(flats[0].values),
        aliases=flats[0].aliases,
        containers=flats[0].containers,
        rank_leaves=own,
        rank_values=[_through_json(flat.rank_values) for flat in flats],
        rank_containers=[flat.rank_containers for flat in flats],
        outline=flats[0].outline,
        rank_outlines=[flat.rank_outline for flat in flats],
    )
    return Stored(saved, arrays)


def _through_json(values: Mapping[Path, Any]) -> dict[Path, Any]:
    return {path: decode(json.loads(json.dumps(encode(value, path)))) for path, value in values.items()}


def fill(stored: Stored, path: Path, rank: int | None, target: ArrayLeaf) -> None:
    whole = stored.arrays[path, rank]
    assert whole.dtype == DTYPES[target.dtype].numpy
    assert whole.shape == target.shape
    for part in target.parts:
        write_part(part, target.dtype, whole[region(part)])


def load(
    stored: Stored, state: Mapping[str, Any], rank: int = 0, world_size: int | None = None, **options: Any
) -> LoadReport:
    """Fill a state from the checkpoint, as one rank of a world of the same size unless told otherwise."""
    size = stored.saved.world_size if world_size is None else world_size
    binding = bind(state, stored.saved, rank, size, **options)
    for read in binding.reads:
        fill(stored, read.path, read.rank, read.target)
    binding.finish()
    return binding.report
