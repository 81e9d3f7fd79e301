"""The tail of an archive: plain values, checksum table, padding and central directory.

Its entries follow each other from the tail's start on, so that a reader walks them without the directory.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.archive import zip as zipfmt
from ckptengine.archive.image import ALIGNMENT, BLOCK_NBYTES, Image, array_metadata
from ckptengine.archive.names import checksums_node
from ckptengine.errors import CheckpointDamagedError

__all__ = ["build_tail", "checksums_of", "document_of"]


def build_tail(
    image: Image,
    values: Sequence[tuple[str, bytes]],
    entry_crcs: NDArray[np.uint32],
    block_crcs: NDArray[np.uint32],
) -> bytes:
    """Return the tail of an archive, a multiple of 4096 bytes.

    `values` are entries (name, bytes), such as `objects/zarr.json`. `entry_crcs` has one CRC for each chunk of
    the image, `block_crcs` one for each block of its fixed region.
    """
    node = checksums_node(image.name)
    table = array_metadata(
        block_crcs.shape,
        [max(1, block_crcs.size)],
        "uint32",
        0,
        {"ckptengine": {"block_nbytes": BLOCK_NBYTES, "nbytes": image.fixed_nbytes}},
    )
    checksums = block_crcs.astype("<u4").tobytes()
    entries = [*values, (f"{node}/zarr.json", table), (f"{node}/c/0", checksums)]
    tail, records = bytearray(), bytearray()
    for name, data in entries:
        _append(tail, records, image.fixed_nbytes, name, data)
    padding = f"{node}/padding-tail"
    records_after = len(records) + len(zipfmt.directory_record(padding.encode(), 0, 0, image.fixed_nbytes + len(tail)))
    overhead = zipfmt.header_nbytes(padding.encode()) + zipfmt.DESCRIPTOR_NBYTES
    rest = len(image.directory.records) + records_after + zipfmt.end_records_nbytes
    _append(tail, records, image.fixed_nbytes, padding, bytes(-(len(tail) + overhead + rest) % ALIGNMENT))
    directory = np.frombuffer(bytearray(image.directory.records), np.uint8)
    columns = image.directory.crc_positions[:, None] + np.arange(4)
    directory[columns] = entry_crcs.astype("<u4").view(np.uint8).reshape(-1, 4)
    position = image.fixed_nbytes + len(tail)
    count = image.directory.count + len(entries) + 1
    end = zipfmt.end_records(count, position, directory.size + len(records))
    return bytes(tail) + directory.tobytes() + bytes(records) + end


def _append(tail: bytearray, records: bytearray, base: int, entry: str, data: bytes) -> None:
    name, crc = entry.encode(), zlib.crc32(data)
    records += zipfmt.directory_record(name, crc, len(data), base + len(tail))
    tail += zipfmt.local_header(name, len(data)) + data + zipfmt.descriptor(crc, len(data))


def checksums_of(entries: dict[str, bytes], archive: str, fixed_nbytes: int, where: str) -> NDArray[np.uint32]:
    """Return the block checksums found in a tail, uint32 of shape (number of blocks,).

    Raises `CheckpointDamagedError` where the table is missing or does not fit the fixed region.
    """
    node = checksums_node(archive)
    metadata = document_of(entries, f"{node}/zarr.json", where)
    try:
        about = metadata["attributes"]["ckptengine"]
        fits = about["block_nbytes"] == BLOCK_NBYTES and about["nbytes"] == fixed_nbytes
    except (KeyError, TypeError):
        fits = False
    table = entries.get(f"{node}/c/0", b"")
    if not fits or len(table) != 4 * -(-fixed_nbytes // BLOCK_NBYTES):
        raise CheckpointDamagedError(f"{where}: the checksum table {node} does not fit the archive")
    return np.frombuffer(table, "<u4").astype(np.uint32)


def document_of(entries: dict[str, bytes], name: str, where: str) -> dict[str, Any]:
    """Return a JSON entry of a tail; raises `CheckpointDamagedError` where it is missing or no JSON object."""
    if name not in entries:
        raise CheckpointDamagedError(f"{where}: entry {name!r} is missing")
    try:
        document = json.loads(entries[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: entry {name!r} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointDamagedError(f"{where}: entry {name!r} is not a JSON object")
    return document
