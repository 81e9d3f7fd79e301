"""The image of an archive: which byte lies where, planned once for a structure of the state.

An archive is `[fixed region][tail]`. The fixed region holds every header and every array of the plan at
positions that don't depend on the values; the tail (`ckptengine.archive.tail`) holds what varies in length.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.archive import zip as zipfmt
from ckptengine.archive.names import checksums_node, chunk_key, leaf_node, rank_node
from ckptengine.layout.assign import Assigned
from ckptengine.layout.grid import cell_index
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import Placement

__all__ = [
    "ALIGNMENT",
    "BLOCK_NBYTES",
    "Chunk",
    "Directory",
    "Image",
    "array_metadata",
    "group_metadata",
    "plan_entries",
    "plan_image",
]

ALIGNMENT = 4096
"""Large entries start, and regions end, at multiples of this: what `O_DIRECT` asks for on every common disk."""

LARGE_NBYTES = 1 << 20
"""Entries from this size on are aligned; smaller ones are packed, since the padding would cost up to 4 KiB each."""

BLOCK_NBYTES = 1 << 16
"""Bytes that one checksum covers: a partial read is rounded to these, a table entry costs 4 bytes for each."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored chunk: `box` of the leaf, dense in C order in `dense_shape` (edge chunks are padded with zeros).

    `leaf` is the number of the leaf in what the rank was assigned, `order` the chunk's among all its boxes.
    """

    leaf: int
    order: int
    box: Box
    dense_shape: tuple[int, ...]
    position: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Directory:
    """The fixed entries' part of the central directory, in which the chunks' CRCs are still zero."""

    records: bytes
    count: int
    crc_positions: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Image:
    """The plan of one archive.

    `static` are the bytes of the fixed region that no save changes, by position. `extents` has a row
    (position, nbytes, first piece, position of the descriptor's CRC) for each chunk, in the order of `chunks`
    and of `directory.crc_positions`; a *piece* is what one block covers of one chunk, `pieces` is their number.
    """

    name: str
    fixed_nbytes: int
    static: tuple[tuple[int, bytes], ...]
    chunks: tuple[Chunk, ...]
    extents: NDArray[np.int64]
    pieces: int
    directory: Directory

    @property
    def blocks(self) -> int:
        """Number of checksum blocks of the fixed region."""
        return -(-self.fixed_nbytes // BLOCK_NBYTES)


def group_metadata(attributes: dict[str, Any] | None = None) -> bytes:
    """Return the `zarr.json` of a group."""
    return _json({"zarr_format": 3, "node_type": "group", "attributes": attributes or {}})


def array_metadata(
    shape: Sequence[int],
    chunk_shape: Sequence[int],
    data_type: str,
    fill_value: Any,
    attributes: dict[str, Any] | None = None,
    serializer: dict[str, Any] | None = None,
) -> bytes:
    """Return the `zarr.json` of an array with a regular grid; its one codec is `serializer`, or little-endian bytes."""
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill_value,
            "codecs": [serializer or {"name": "bytes", "configuration": {"endian": "little"}}],
            "attributes": attributes or {},
        }
    )


def plan_image(name: str, rank: int, assigned: Iterable[Assigned]) -> Image:
    """Return the plan of a rank's archive, given what the rank writes.

    Order: metadata, small chunks, large chunks; so that the blocks which are not wholly inside one chunk, and
    whose checksums need a pass of their own, are few.
    """
    metadata = {f"{group}zarr.json": group_metadata() for group in ("", "state/", "ranks/", "checksums/")}
    pending: list[_Pending] = []
    for number, leaf in enumerate(assigned):
        if not leaf.writes:
            continue
        node = leaf_node(leaf.path, rank if leaf.placement is Placement.PER_RANK else None)
        _add_groups(metadata, node, rank_node(rank))
        pending += _chunks_of(number, leaf, node, metadata)
    writer = _Writer()
    for entry, data in metadata.items():
        writer.add_static(entry, data)
    chunks = []
    for aligned in (False, True):
        for order, item in enumerate(pending):
            if (item.nbytes >= LARGE_NBYTES) is aligned:
                chunks.append(writer.add_chunk(item, order, aligned))
    return writer.image(name, chunks)


def plan_entries(name: str, entries: Iterable[tuple[str, bytes]]) -> Image:
    """Return the plan of an archive whose entries are all known beforehand, such as the layout file."""
    writer = _Writer()
    writer.add_static("zarr.json", group_metadata())
    writer.add_static("checksums/zarr.json", group_metadata())
    for entry, data in entries:
        writer.add_static(entry, data)
    return writer.image(name, [])


@dataclass(frozen=True, slots=True)
class _Pending:
    """A chunk that has no position yet."""

    entry: str
    leaf: int
    box: Box
    dense_shape: tuple[int, ...]
    nbytes: int


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _add_groups(metadata: dict[str, bytes], node: str, in_tail: str) -> None:
    """Add the groups above a node; the rank's own group carries plain values and therefore is in the tail."""
    keys = node.split("/")[:-1]
    for depth in range(1, len(keys) + 1):
        group = "/".join(keys[:depth])
        if group != in_tail:
            metadata.setdefault(f"{group}/zarr.json", group_metadata())


def _chunks_of(number: int, leaf: Assigned, node: str, metadata: dict[str, bytes]) -> list[_Pending]:
    """Add the metadata of a leaf and return its chunks."""
    dtype = DTYPES[leaf.dtype]
    about = {
        "path": list(leaf.path),
        "dtype": leaf.dtype,
        "placement": leaf.placement.value,
        "container": leaf.container,
    }
    boxes = [
        Box(tuple(offset), tuple(lengths))
        for offset, lengths in zip(leaf.offsets.tolist(), leaf.lengths.tolist(), strict=True)
    ]
    if leaf.chunk_shape is not None:
        chunk = leaf.chunk_shape
        metadata[f"{node}/zarr.json"] = array_metadata(leaf.shape, chunk, dtype.zarr, dtype.fill, {"ckptengine": about})
        nbytes = math.prod(chunk) * dtype.itemsize
        return [_Pending(chunk_key(node, cell_index(box.offset, chunk)), number, box, chunk, nbytes) for box in boxes]
    metadata[f"{node}/zarr.json"] = group_metadata({"ckptengine": about | {"shape": list(leaf.shape)}})
    result = []
    for box, fragment in zip(boxes, leaf.fragments, strict=True):
        part = f"{node}/{fragment}"
        metadata[f"{part}/zarr.json"] = array_metadata(
            box.shape, box.shape, dtype.zarr, dtype.fill, {"ckptengine": {"offset": list(box.offset)}}
        )
        key = chunk_key(part, (0,) * len(box.shape))
        result.append(_Pending(key, number, box, box.shape, box.volume * dtype.itemsize))
    return result


class _Writer:
    """Lays entries one after the other and collects what is known of them."""

    def __init__(self) -> None:
        self.position = 0
        self.static: list[tuple[int, bytes]] = []
        self.extents: list[tuple[int, int, int, int]] = []
        self.pieces = 0
        self.directory = bytearray()
        self.count = 0
        self.crc_positions: list[int] = []

    def _put(self, data: bytes) -> None:
        self.static.append((self.position, data))
        self.position += len(data)

    def _record(self, name: bytes, crc: int, nbytes: int, header: int) -> None:
        self.directory += zipfmt.directory_record(name, crc, nbytes, header)
        self.count += 1

    def add_static(self, entry: str, data: bytes) -> None:
        name, crc = entry.encode(), zlib.crc32(data)
        self._record(name, crc, len(data), self.position)
        self._put(zipfmt.local_header(name, len(data)) + data + zipfmt.descriptor(crc, len(data)))

    def add_chunk(self, chunk: _Pending, order: int, aligned: bool) -> Chunk:
        name, nbytes = chunk.entry.encode(), chunk.nbytes
        padding = _padding(self.position + zipfmt.header_nbytes(name)) if aligned else 0
        self.crc_positions.append(len(self.directory) + zipfmt.CRC_IN_DIRECTORY)
        self._record(name, 0, nbytes, self.position)
        self._put(zipfmt.local_header(name, nbytes, padding))
        start, end = self.position, self.position + nbytes
        self.position = end
        self._put(zipfmt.descriptor(0, nbytes))
        self.extents.append((start, nbytes, self.pieces, end + zipfmt.CRC_IN_DESCRIPTOR))
        self.pieces += -(-end // BLOCK_NBYTES) - start // BLOCK_NBYTES
        return Chunk(chunk.leaf, order, chunk.box, chunk.dense_shape, start, nbytes)

    def image(self, name: str, chunks: list[Chunk]) -> Image:
        """Fill up to the alignment with an entry of zeros, and return the plan."""
        entry = f"{checksums_node(name)}/padding-fixed"
        overhead = zipfmt.header_nbytes(entry.encode()) + zipfmt.DESCRIPTOR_NBYTES
        self.add_static(entry, bytes(-(self.position + overhead) % ALIGNMENT))
        extents = np.array(self.extents, np.int64).reshape(-1, 4)
        positions = np.array(self.crc_positions, np.int64)
        directory = Directory(bytes(self.directory), self.count, positions)
        return Image(name, self.position, tuple(self.static), tuple(chunks), extents, self.pieces, directory)


def _padding(position: int) -> int:
    """Return how many bytes an extra field must have to move `position` to the alignment (0, or at least 6)."""
    padding = -position % ALIGNMENT
    return padding + ALIGNMENT if 0 < padding < 6 else padding
