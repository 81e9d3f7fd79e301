"""MindSpore's checkpoint files (.ckpt): protobuf messages, one for each array or slice of one.

Source: mindspore/train/checkpoint.proto and `_exec_save` in mindspore/train/serialization.py of MindSpore 2.10: a
`Checkpoint` has `Value`s (field 1) of a `tag` (1) and a `TensorProto` (2) of `dims` (1), `tensor_type` (2) and
`tensor_content` (3); an array of more than 512 MiB is several values of one tag, which the reader joins.
"""

from __future__ import annotations

import math

from ckptengine.errors import ForeignFormatError
from ckptengine.export.contents import Contents, Item
from ckptengine.export.stream import FilePlan, Segment
from ckptengine.schema.box import Box

__all__ = ["plan_mindspore"]

SLICE_NBYTES = 512 << 20
_TYPES = {
    "int8": "Int8",
    "uint8": "UInt8",
    "int16": "Int16",
    "uint16": "UInt16",
    "int32": "Int32",
    "uint32": "UInt32",
    "int64": "Int64",
    "uint64": "UInt64",
    "float16": "Float16",
    "float32": "Float32",
    "float64": "Float64",
    "bool": "Bool",
    "bfloat16": "BFloat16",
}


def plan_mindspore(name: str, contents: Contents) -> FilePlan:
    """Return the plan of one file; raises `ForeignFormatError` naming an array whose dtype the format lacks."""
    segments: list[Segment] = []
    for item in contents.items:
        if item.dtype not in _TYPES:
            raise ForeignFormatError(f"{item.name}: MindSpore's files have no {item.dtype}; leave it out with `only`")
        # A scalar has one dimension of no length, as MindSpore writes it.
        dims = b"".join(b"\x08" + _varint(length) for length in item.shape or (0,))
        head = dims + _field(2, _TYPES[item.dtype].encode())
        for part in _slices(item):
            content = b"\x1a" + _varint(part.nbytes)
            tensor = head + content
            tag = _field(1, item.name.encode())
            message = tag + b"\x12" + _varint(len(tensor) + part.nbytes) + tensor
            segments += [b"\x0a" + _varint(len(message) + part.nbytes) + message, part]
    return FilePlan(name, tuple(segments))


def _slices(item: Item) -> list[Item]:
    """Return an array as parts of at most 512 MiB that are cut between rows."""
    if item.nbytes <= SLICE_NBYTES:
        return [item]
    row = math.prod(item.shape[1:]) * item.itemsize
    if row > SLICE_NBYTES:
        raise ForeignFormatError(f"{item.name}: a row of it has {row:,} bytes, {SLICE_NBYTES:,} are the most")
    rows = SLICE_NBYTES // row
    rest = (0,) * (len(item.shape) - 1)
    return [
        Item(
            item.path,
            item.leaf,
            item.stored,
            item.dtype,
            item.shape,
            Box((begin, *rest), (min(rows, item.shape[0] - begin), *item.shape[1:])),
        )
        for begin in range(0, item.shape[0], rows)
    ]


def _field(number: int, data: bytes) -> bytes:
    """Return a length-delimited field."""
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
