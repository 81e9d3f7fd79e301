"""The layout file: which box of which leaf lies where, as compressed columns in an archive of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from ckptengine import _native
from ckptengine.archive.image import BLOCK_NBYTES, array_metadata, group_metadata, plan_entries
from ckptengine.archive.reader import open_archive
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.tail import build_tail
from ckptengine.archive.zip import walk_entries
from ckptengine.errors import CheckpointDamagedError
from ckptengine.layout.rows import RowTable, columns, from_columns, leaves_to_json
from ckptengine.storage.base import Storage

__all__ = ["LAYOUT_NAME", "encode_layout", "read_layout"]

LAYOUT_NAME = "layout.zarr.zip"

CHUNK_ROWS = 1 << 16
"""Elements per chunk of a column: small enough that a reader of few leaves reads little, large enough to compress."""

_LEVEL = 1  # the columns are regular; higher levels gain next to nothing and cost time on the coordinator

_COLUMN_TYPES = ("uint8", "int32", "int64")
_MAX_COLUMN_NBYTES = 1 << 36


def encode_layout(table: RowTable) -> tuple[bytes, ArchiveRecord]:
    """Return the bytes of a layout file, and its record for the manifest."""
    leaves = json.dumps(leaves_to_json(table), separators=(",", ":")).encode()
    arrays = {"leaves": np.frombuffer(leaves, np.uint8), **columns(table)}
    entries = [("layout/zarr.json", group_metadata())]
    for name, column in arrays.items():
        entries += _column_entries(f"layout/{name}", column)
    image = plan_entries(LAYOUT_NAME, entries)
    fixed = np.zeros(image.fixed_nbytes, np.uint8)
    for position, data in image.static:
        fixed[position : position + len(data)] = np.frombuffer(data, np.uint8)
    blocks = [_native.crc32(fixed[start : start + BLOCK_NBYTES]) for start in range(0, fixed.size, BLOCK_NBYTES)]
    tail = build_tail(image, [], np.zeros(0, np.uint32), np.array(blocks, np.uint32))
    record = ArchiveRecord(LAYOUT_NAME, fixed.size + len(tail), fixed.size, hashlib.sha256(tail).hexdigest())
    return fixed.tobytes() + tail, record


def read_layout(storage: Storage, name: str, record: ArchiveRecord, fixed_nbytes: Sequence[int]) -> RowTable:
    """Return the rows of a checkpoint, every byte verified.

    `fixed_nbytes` are the sizes of the archives' fixed regions, in which all rows must lie.

    Raises `CheckpointDamagedError` naming the file where its bytes or its rows are not what they must be.
    """
    archive = open_archive(storage, name, record)
    where = archive.location
    fixed = archive.read(0, archive.fixed_nbytes)
    entries = walk_entries(fixed, where)
    leaves = _column(entries, "leaves", where).tobytes()
    arrays = {name: _column(entries, name, where) for name in ("archive", "position", "nbytes", "offsets", "lengths")}
    try:
        document = json.loads(leaves)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: the table of leaves is not JSON: {error}") from None
    return from_columns(document, arrays, fixed_nbytes)


def _column_entries(node: str, column: NDArray[Any]) -> list[tuple[str, bytes]]:
    rows = max(1, min(CHUNK_ROWS, column.size))
    codec = {"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}
    metadata = array_metadata(column.shape, (rows,), column.dtype.name, 0, codecs=[codec])
    entries = [(f"{node}/zarr.json", metadata)]
    for number, start in enumerate(range(0, column.size, rows)):
        chunk = np.zeros(rows, column.dtype.newbyteorder("<"))
        part = column[start : start + rows]
        chunk[: part.size] = part
        entries.append((f"{node}/c/{number}", bytes(Zstd(level=_LEVEL).encode(chunk))))
    return entries


def _column(entries: dict[str, bytes], name: str, where: str) -> NDArray[Any]:
    """Return one column; the sizes that the file claims are compared before anything is allocated by them."""
    try:
        metadata = json.loads(entries[f"layout/{name}/zarr.json"])
        (size,), (rows,) = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if metadata["data_type"] not in _COLUMN_TYPES:
            raise ValueError(f"data type {metadata['data_type']!r:.40}")
        dtype = np.dtype(metadata["data_type"])
        if type(size) is not int or type(rows) is not int or size < 0 or rows < 1:
            raise ValueError("not a column of integers")
        if size * dtype.itemsize > _MAX_COLUMN_NBYTES or rows > CHUNK_ROWS:
            raise ValueError(f"{size} elements in chunks of {rows} are more than a layout has")
        chunks = [
            _decompressed(entries[f"layout/{name}/c/{number}"], rows * dtype.itemsize)
            for number in range(-(-size // rows))
        ]
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: column {name!r} is unreadable: {error!r}") from None
    return np.frombuffer(b"".join(chunks), dtype.newbyteorder("<"))[:size].astype(dtype)


def _decompressed(data: bytes, nbytes: int) -> bytes:
    """Return a chunk, decoded into memory of the expected size, which must be what its frame holds."""
    if _content_nbytes(data) != nbytes:
        raise ValueError(f"a chunk does not hold {nbytes} bytes")
    out = np.zeros(nbytes, np.uint8)
    Zstd().decode(data, out)
    return out.tobytes()


def _content_nbytes(frame: bytes) -> int | None:
    """Return the bytes that a zstd frame says it holds (RFC 8878, 3.1.1.1), None where it doesn't say."""
    if len(frame) < 5 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = frame[4]
    single_segment = bool(descriptor & 0x20)
    width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    field = frame[start : start + width]
    if width == 0 or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)
