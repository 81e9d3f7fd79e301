"""What a checkpoint holds, in the words of torch's distributed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptengine.errors import CheckpointDamagedError
from ckptengine.layout.grid import cell_boxes
from ckptengine.load.checkpoint import Checkpoint, Opened
from ckptengine.load.describe import describe
from ckptengine.schema.path import Key, Path
from ckptengine.state.saved import Saved
from ckptengine.state.tree import unflatten
from ckptengine.torch.tensor import torch_dtype

__all__ = ["Contents", "contents_of"]


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint as torch's planners see it, by the names that they give things.

    `tensors` leads from each tensor's name to the number of its leaf in the checkpoint's rows. `objects` has the plain
    values; `holding` has those in which arrays lie, such as tuples, by the path from which they are to be made.
    """

    metadata: Metadata
    saved: Saved
    tensors: Mapping[str, int]
    objects: Mapping[str, Any]
    holding: Mapping[str, Path]


def contents_of(checkpoint: Opened) -> Contents:
    """Return what a checkpoint holds for all ranks; what ranks keep of their own (`PerRank`) has no place in it.

    Any checkpoint of this engine has contents, whoever saved it. Raises `CheckpointDamagedError`.
    """
    saved = describe(checkpoint)
    numbers: dict[int, int] = {}  # of the leaves, by the ids of what stands for them
    arrays: dict[Path, torch.Tensor] = {}
    for path in (*saved.leaves, *saved.aliases):
        first = saved.aliases.get(path, path)
        leaf = saved.leaves[first]
        arrays[path] = torch.empty(leaf.shape, dtype=torch_dtype(leaf.dtype), device="meta")
        numbers[id(arrays[path])] = checkpoint.rows.index[first, None]
    nested = unflatten({**saved.values, **_empty(saved)}, arrays, saved.containers, {})
    _keep_whole(nested, checkpoint)
    flat, paths = flatten_state_dict({str(key): value for key, value in nested.items()})
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    tensors: dict[str, int] = {}
    objects: dict[str, Any] = {}
    own = {tuple(map(str, path)): path for path in _prefixes(arrays)}  # torch's planners make keys strings
    holding: dict[str, Path] = {}
    for name, value in flat.items():
        if isinstance(value, torch.Tensor) and id(value) in numbers:
            tensors[name] = numbers[id(value)]
            described[name] = _described(checkpoint, tensors[name], value)
        else:
            objects[name] = value.value if isinstance(value, _Whole) else value
            inside = own.get(tuple(map(str, paths[name])))
            if inside is not None:
                holding[name] = inside
            described[name] = BytesStorageMetadata()
    return Contents(Metadata(described, planner_data=paths), saved, tensors, objects, holding)


@dataclass(frozen=True, slots=True)
class _Whole:
    """A value that torch's planners are not to flatten."""

    value: Any


def _keep_whole(nested: dict[Key, Any], checkpoint: Opened) -> None:
    """Wrap what was saved as one object, though arrays or a tree lie in it: a numpy array, what was not flattened."""
    if not isinstance(checkpoint, Checkpoint):
        return
    for path in checkpoint.shared.get("objects", ()):
        try:
            holder: Any = nested
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = _Whole(holder[path[-1]])
        except (LookupError, TypeError):
            where = checkpoint.archive(0).location
            raise CheckpointDamagedError(f"{where}: {path!r:.80} is listed as an object, but does not exist") from None


def _prefixes(arrays: Mapping[Path, Any]) -> set[Path]:
    """Return the paths of arrays, and of all that they lie in."""
    return {path[:depth] for path in arrays for depth in range(1, len(path) + 1)}


def _empty(saved: Saved) -> dict[Path, Any]:
    outline = saved.outline
    return {} if outline is None or outline.empty is None else {path: {} for path in outline.empty}


def _described(checkpoint: Opened, number: int, like: torch.Tensor) -> TensorStorageMetadata:
    record = checkpoint.rows.leaves[number]
    if not record.shape or 0 in record.shape:
        chunks = [ChunkStorageMetadata(torch.Size([0] * len(record.shape)), torch.Size(record.shape))]
    else:
        if record.chunk_shape is not None:
            cells = np.arange(record.rows[1] - record.rows[0])
            offsets, lengths = cell_boxes(record.shape, record.chunk_shape, cells)
        else:
            offsets, lengths = checkpoint.rows.boxes(number)
        pairs = zip(offsets.tolist(), lengths.tolist(), strict=True)
        chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(length)) for offset, length in pairs]
    return TensorStorageMetadata(TensorProperties(dtype=like.dtype), like.size(), chunks)
