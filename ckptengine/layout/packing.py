"""Tables as bytes: a JSON part and int64 columns, each compressed, for the messages between ranks."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ckptengine.layout.tiling import Int64s

__all__ = ["pack", "parse_json", "unpack", "unpack_column"]

# A message is: magic, number of parts (uint32); for each part its raw and its compressed size (two uint64);
# then the compressed parts. All little-endian. The parts are compressed one by one, so that the JSON table,
# which most ranks share, is the same bytes in each message and need be read once.
_MAGIC = b"ckp\x01"
_COUNT = struct.Struct("<I")
_SIZES = struct.Struct("<QQ")
_LEVEL = 1
_INT64 = np.dtype("<i8")
# DEFLATE can't expand by more (RFC 1951: 258 bytes from 2 bits), which bounds what a message makes us
# allocate.
_MAX_RATIO = 1032


def pack(table: Any, columns: Sequence[Int64s]) -> bytes:
    """Return one message of a JSON-able table and 1-D int64 columns."""
    raw = [json.dumps(table, separators=(",", ":")).encode()]
    raw += [np.ascontiguousarray(column, _INT64).tobytes() for column in columns]
    packed = [zlib.compress(part, _LEVEL) for part in raw]
    sizes = b"".join(_SIZES.pack(len(part), len(small)) for part, small in zip(raw, packed, strict=True))
    return b"".join([_MAGIC, _COUNT.pack(len(raw)), sizes, *packed])


def unpack(message: bytes, columns: int) -> tuple[bytes, list[Int64s]]:
    """Return the compressed JSON (for `parse_json`) and the columns; ValueError where it is no message."""
    head = len(_MAGIC) + _COUNT.size
    if len(message) < head or message[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it does not start as a table of this version does")
    (count,) = _COUNT.unpack_from(message, len(_MAGIC))
    if count != columns + 1:
        raise ValueError(f"it has {count} parts instead of {columns + 1}")
    position = head + count * _SIZES.size
    if len(message) < position:
        raise ValueError("it is cut short")
    parts = []
    for index in range(count):
        raw_nbytes, nbytes = _SIZES.unpack_from(message, head + index * _SIZES.size)
        if nbytes > len(message) - position:
            raise ValueError("it is cut short")
        parts.append((raw_nbytes, message[position : position + nbytes]))
        position += nbytes
    if position != len(message):
        raise ValueError(f"{len(message) - position} bytes follow its end")
    json_part = _SIZES.pack(parts[0][0], len(parts[0][1])) + parts[0][1]
    return json_part, [unpack_column(raw_nbytes, part) for raw_nbytes, part in parts[1:]]


def unpack_column(raw_nbytes: int, part: bytes) -> Int64s:
    """Return one column; ValueError where its size is not that of whole numbers."""
    if raw_nbytes % _INT64.itemsize:
        raise ValueError("a column does not end with a whole number")
    return np.frombuffer(_inflate(raw_nbytes, part), _INT64).astype(np.int64, copy=False)


def parse_json(json_part: bytes) -> Any:
    """Return the table that `unpack` gave as compressed JSON; ValueError where it is none."""
    raw_nbytes, _ = _SIZES.unpack_from(json_part)
    try:
        return json.loads(_inflate(raw_nbytes, json_part[_SIZES.size :]).decode())
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def _inflate(raw_nbytes: int, part: bytes) -> bytes:
    if raw_nbytes > _MAX_RATIO * len(part):
        raise ValueError("a part claims more bytes than it can hold")
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(part, raw_nbytes + 1)
    except zlib.error as error:
        raise ValueError(f"a part can't be decompressed: {error}") from error
    if len(raw) != raw_nbytes or not reader.eof or reader.unused_data:
        raise ValueError("a part has another size than it claims")
    return raw
