"""safetensors files: a length, a JSON header, and the tensors one after the other.

Source: the format section of https://github.com/huggingface/safetensors (README.md), and its parser
(safetensors/src/tensor.rs), whose checks are made here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import CheckpointDamagedError, ForeignFormatError
from ckptengine.foreign.description import Description, ForeignFile, ForeignLeaf, Piece, describe_leaves
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.storage.base import StorageView

__all__ = [
    "DTYPE_NAMES",
    "FORMAT",
    "MAX_HEADER_NBYTES",
    "Entry",
    "Header",
    "container_of",
    "describe_safetensors",
    "entry_leaf",
    "read_header",
]

FORMAT = "safetensors"
MAX_HEADER_NBYTES = 100_000_000
"""Bytes of a header at most, as in the reference parser."""
_LENGTH_NBYTES = 8

DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
"""Logical dtypes by the format's names. `F4` is apart: its shape counts elements of half a byte."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header: logical dtype, shape, and its bytes `[begin, end)` in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header: its tensors by name, what the writer noted, and the size of the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    nbytes: int


def read_header(storage: StorageView, name: str) -> Header:
    """Return the header of a file, every claim of it checked; of the tensors' bytes only where they lie can be.

    Raises `CheckpointDamagedError`, naming file and tensor, where the file is cut off, or the header lies: a length
    that the file has no room for, offsets that overlap, leave holes or lead out of the file, a shape that has another
    number of bytes; `ForeignFormatError` for a dtype that is not known.
    """
    where = storage.location(name)
    nbytes = storage.size(name)
    if nbytes is None:
        raise CheckpointDamagedError(f"{where}: the file is missing")
    if nbytes < _LENGTH_NBYTES:
        raise CheckpointDamagedError(f"{where}: {nbytes} bytes long, a safetensors file has {_LENGTH_NBYTES} at least")
    length = int.from_bytes(storage.read_range(name, 0, _LENGTH_NBYTES), "little")
    room = nbytes - _LENGTH_NBYTES
    if length > min(room, MAX_HEADER_NBYTES):
        raise CheckpointDamagedError(
            f"{where}: its header is said to have {length:,} bytes, the file has {room:,} after the length and "
            f"{MAX_HEADER_NBYTES:,} are the most: it is truncated, or not a safetensors file"
        )
    text = storage.read_range(name, _LENGTH_NBYTES, length)
    try:
        if text[:1] != b"{":
            raise ValueError("it does not begin with {")
        document = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: its header is not the JSON that it must be: {error}") from None
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise CheckpointDamagedError(f"{where}: __metadata__ in its header is no object of texts")
    start = _LENGTH_NBYTES + length
    try:
        entries = {key: _entry(key, value, start) for key, value in document.items()}
        _check_layout(entries, start, nbytes)
    except ValueError as error:
        raise CheckpointDamagedError(f"{where}: {error}") from None
    except ForeignFormatError as error:
        raise ForeignFormatError(f"{where}: {error}") from None
    return Header(entries, metadata, nbytes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r:.120} comes twice")
    return found


def _entry(name: str, value: Any, start: int) -> Entry:
    """Return one tensor; ValueError says what its header has wrong."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {name!r:.120} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the tensor {name!r:.120} has the shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"the tensor {name!r:.120} has the offsets {offsets!r:.80}")
    if dtype == "F4" and shape and shape[-1] % 2 == 0:
        logical, shape = "float4_e2m1fn_x2", [*shape[:-1], shape[-1] // 2]
    elif dtype in DTYPE_NAMES:
        logical = DTYPE_NAMES[dtype]
    else:
        raise ForeignFormatError(f"the tensor {name!r:.120} is of the dtype {dtype!r:.40}, which is not read")
    nbytes = math.prod(shape) * DTYPES[logical].itemsize
    begin, end = offsets
    if end - begin != nbytes:
        raise ValueError(
            f"the tensor {name!r:.120} has {end - begin:,} bytes ({begin} to {end}), its shape {tuple(shape)} of "
            f"{dtype} takes {nbytes:,}"
        )
    return Entry(logical, tuple(shape), start + begin, start + end)


def _check_layout(entries: dict[str, Entry], start: int, nbytes: int) -> None:
    """Raise ValueError unless the tensors lie one after the other, from the header to the end of the file."""
    at, before = start, ""
    for name, one in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if one.end > nbytes:
            raise ValueError(
                f"the tensor {name!r:.120} ends at byte {one.end:,}, the file at {nbytes:,}: it is cut off"
            )
        if one.begin != at:
            what = "overlap" if one.begin < at else "leave a hole between them"
            raise ValueError(f"the tensors {before!r:.120} and {name!r:.120} {what}, at byte {one.begin:,}")
        at, before = one.end, name
    if at != nbytes:
        raise ValueError(f"the tensors end at byte {at:,}, the file at {nbytes:,}")


def describe_safetensors(storage: StorageView, name: str) -> Description:
    """Return what a safetensors file holds; raises what `read_header` does."""
    header = read_header(storage, name)
    leaves = [entry_leaf(key, entry, 0) for key, entry in header.entries.items()]
    files = (ForeignFile(name, header.nbytes),)
    table, _, _ = describe_leaves(leaves, files, container_of([header]), storage.location(name))
    return Description(FORMAT, files, table, flat=True, metadata=header.metadata)


def entry_leaf(name: str, entry: Entry, file: int) -> ForeignLeaf:
    """Return a tensor of a header that is whole in one file."""
    pieces = (Piece(Box.whole(entry.shape), file, entry.begin),)
    return ForeignLeaf((name,), entry.dtype, entry.shape, pieces)


def container_of(headers: Iterable[Header]) -> str:
    """Return the framework that wrote files, as far as they tell: torch, or else numpy, whose arrays all take."""
    return "torch" if any(header.metadata.get("format") == "pt" for header in headers) else "numpy"
