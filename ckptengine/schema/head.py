"""What is said of a leaf wherever it goes: its path, element type, global shape and placement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, dotted

__all__ = [
    "MAX_LEAF_NBYTES",
    "MAX_NDIM",
    "LeafHead",
    "LeafLayout",
    "head_from_json",
    "head_to_json",
    "is_zero_sized",
    "layout_from_json",
    "layout_to_json",
    "zero_sized_chunk",
]

MAX_NDIM = 32
"""Dimensions of a leaf at most: what numpy 1.26 can represent."""

MAX_LEAF_NBYTES = 1 << 62
"""Bytes of a leaf at most, so that every element's place and every sum of two of them fits in int64."""

_HEAD_FIELDS = frozenset({"path", "dtype", "shape", "placement", "container"})


@dataclass(frozen=True, slots=True)
class LeafHead:
    """One leaf without its boxes; the fields are those of `ArrayLeaf`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    placement: Placement
    container: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def name(self) -> str:
        """The dotted path, for messages only."""
        return dotted(self.path)


@dataclass(frozen=True, slots=True)
class LeafLayout(LeafHead):
    """A leaf and how it is stored: as one grid of chunks of this shape, or (None) as one fragment per box."""

    chunk_shape: tuple[int, ...] | None


def is_zero_sized(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape has no elements."""
    return 0 in shape


def zero_sized_chunk(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the chunk shape of a leaf without elements: Zarr wants every chunk length to be at least 1."""
    return tuple(max(1, length) for length in shape)


def head_to_json(head: LeafHead) -> dict[str, Any]:
    """Return a JSON-able dict; integer and string keys of the path stay apart."""
    return {
        "path": list(head.path),
        "dtype": head.dtype,
        "shape": list(head.shape),
        "placement": head.placement.value,
        "container": head.container,
    }


def layout_to_json(layout: LeafLayout) -> dict[str, Any]:
    """Return `head_to_json` with `chunk_shape`, which is null for fragments."""
    chunk = layout.chunk_shape
    return {**head_to_json(layout), "chunk_shape": None if chunk is None else list(chunk)}


def head_from_json(value: object) -> LeafHead:
    """Return the head that `head_to_json` described; ValueError says what is wrong with anything else."""
    return LeafHead(*_head_values(_fields(value, _HEAD_FIELDS)))


def layout_from_json(value: object) -> LeafLayout:
    """Return the layout that `layout_to_json` described; ValueError says what is wrong with anything else."""
    fields = _fields(value, _HEAD_FIELDS | {"chunk_shape"})
    path, dtype, shape, placement, container = _head_values(fields)
    chunk = fields["chunk_shape"]
    if chunk is not None:
        chunk = _shape(chunk, "chunk_shape", path)
        bound = zero_sized_chunk(shape)
        if len(chunk) != len(shape) or any(not 1 <= c <= b for c, b in zip(chunk, bound, strict=False)):
            raise ValueError(f"leaf {dotted(path)}: chunk shape {chunk} does not fit the shape {shape}")
    return LeafLayout(path, dtype, shape, placement, container, chunk)


def _fields(value: object, names: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"a leaf must be described by exactly {', '.join(sorted(names))}")
    return value


def _head_values(fields: dict[str, Any]) -> tuple[Path, str, tuple[int, ...], Placement, str]:
    path = fields["path"]
    if not isinstance(path, list) or not path or not all(type(key) in (str, int) for key in path):
        raise ValueError("a leaf's path must be a list of strings and integers")
    path = tuple(path)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"leaf {dotted(path)}: unknown dtype {dtype!r}")
    shape = _shape(fields["shape"], "shape", path)
    if math.prod(zero_sized_chunk(shape)) * DTYPES[dtype].itemsize > MAX_LEAF_NBYTES:
        raise ValueError(f"leaf {dotted(path)}: shape {shape} is larger than any tensor can be")
    placement = fields["placement"]
    if not isinstance(placement, str) or placement not in {known.value for known in Placement}:
        raise ValueError(f"leaf {dotted(path)}: unknown placement {placement!r}")
    container = fields["container"]
    if not isinstance(container, str):
        raise ValueError(f"leaf {dotted(path)}: the container must be a string, not {container!r}")
    return path, dtype, shape, Placement(placement), container


def _shape(value: object, what: str, path: Path) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_NDIM or not all(type(length) is int for length in value):
        raise ValueError(f"leaf {dotted(path)}: {what} must be a list of at most {MAX_NDIM} integers")
    if any(not 0 <= length <= MAX_LEAF_NBYTES for length in value):
        raise ValueError(f"leaf {dotted(path)}: {what} {value} has a length out of range")
    return tuple(value)
