"""The layout file: which box of which leaf lies where, as compressed columns in an archive of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

import ckptengine._native as _native
from ckptengine.archive.column import MAX_CHUNK_ITEMS, Column, encode_column, open_column
from ckptengine.archive.directory import read_directory
from ckptengine.archive.image import BLOCK_NBYTES, group_metadata, plan_entries
from ckptengine.archive.reader import Archive, open_archive
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.tail import build_tail
from ckptengine.errors import CheckpointDamagedError
from ckptengine.layout.rows import (
    LeafRecord,
    RowTable,
    check_boxes,
    check_places,
    index_of,
    leaves_from_json,
    leaves_to_json,
    number_starts,
)
from ckptengine.layout.tiling import Int64s, tiles
from ckptengine.schema.path import Path
from ckptengine.storage.base import StorageView

__all__ = ["LAYOUT_NAME", "StoredRows", "encode_layout", "open_layout"]

LAYOUT_NAME = "layout.zarr.zip"

CHUNK_ROWS = 1 << 12
"""Rows per chunk: a reader of one row decodes this many, a chunk costs 16 bytes of index."""

# Which columns there are: their type, and whether neighbours differ so little that differences are stored.
_COLUMNS = {
    "archive": ("int32", True),
    "position": ("int64", True),
    "offsets": ("int64", False),
    "lengths": ("int64", False),
}
_MAX_LEAVES_NBYTES = 1 << 28
_LEAST_LEAVES_NBYTES = 1 << 16
_LEAVES_RATIO = 2
"""Bytes of the table of leaves for each byte of the archives at most: there, every leaf has metadata and a header of
its own, which take more than its record here (0.6 was the most of all kinds of leaves that were tried)."""
_LEAST_CHUNK_NBYTES = 30
"""What a stored chunk takes in its archive at least: a local ZIP header (APPNOTE 4.3.7)."""

_WHOLE_NBYTES = 1 << 20
"""Files up to this size are read at once: their metadata, indices and chunks share blocks, or are a few of them."""


def encode_layout(table: RowTable) -> tuple[bytes, ArchiveRecord]:
    """Return the bytes of a layout file, and its record for the manifest."""
    leaves = json.dumps(leaves_to_json(table.leaves), separators=(",", ":")).encode()
    columns = {"leaves": encode_column(np.frombuffer(leaves, np.uint8), MAX_CHUNK_ITEMS, differences=False)}
    for name, (_, differences) in _COLUMNS.items():
        columns[name] = encode_column(getattr(table, name), CHUNK_ROWS, differences=differences)
    entries = [("layout/zarr.json", group_metadata())]
    # All metadata first, and close together, so that a reader finds it in one or two blocks.
    entries += [(f"layout/{name}/zarr.json", metadata) for name, (metadata, _) in columns.items()]
    entries += [(f"layout/{name}/c/0", data) for name, (_, data) in columns.items()]
    image = plan_entries(LAYOUT_NAME, entries)
    content = bytearray().join(data for _, data in image.static)
    view = memoryview(content)
    blocks = [_native.crc32(view[start : start + BLOCK_NBYTES]) for start in range(0, len(view), BLOCK_NBYTES)]
    tail = build_tail(image, [], np.zeros(0, np.uint32), np.array(blocks, np.uint32))
    record = ArchiveRecord(
        LAYOUT_NAME, image.fixed_nbytes + len(tail), image.fixed_nbytes, hashlib.sha256(tail).hexdigest()
    )
    return b"".join((view, tail)), record


class StoredRows:
    """The rows of a checkpoint; of the file, only the chunks of the rows that are asked for are read.

    `leaves` are all leaves. `fixed_nbytes` are the sizes of the archives' fixed regions, in which chunks must lie.
    """

    def __init__(
        self, archive: Archive, leaves: tuple[LeafRecord, ...], columns: dict[str, Column], fixed_nbytes: Int64s
    ) -> None:
        self.leaves = leaves
        self._archive = archive
        self._columns = columns
        self._fixed_nbytes = fixed_nbytes
        self._starts = number_starts(leaves)

    @cached_property
    def index(self) -> dict[tuple[Path, int | None], int]:
        """The place in `leaves` of each path and rank (None where the leaf is not `PER_RANK`)."""
        return index_of(self.leaves)

    def places(self, rows: Int64s, nbytes: Int64s) -> tuple[Int64s, Int64s]:
        """Return archive and position of the chunks of these rows, whose sizes are `nbytes`; all int64 [n].

        Raises `CheckpointDamagedError` where the file is damaged, or a chunk does not lie in its archive.
        """
        archive, position = self._columns["archive"].take(rows), self._columns["position"].take(rows)
        try:
            check_places(archive, position, nbytes, self._fixed_nbytes)
        except ValueError as error:
            raise _damaged(self._archive, error) from None
        return archive, position

    def boxes(self, leaf: int) -> tuple[Int64s, Int64s]:
        """Return offsets and lengths, int64 [rows, ndim], of all fragments of `leaves[leaf]`, which is no grid.

        Raises `CheckpointDamagedError` where the file is damaged, or a box is not in the leaf.
        """
        record = self.leaves[leaf]
        numbers = np.arange(*self._starts[leaf : leaf + 2])
        shape = (record.rows[1] - record.rows[0], len(record.shape))
        offsets, lengths = (self._columns[name].take(numbers).reshape(shape) for name in ("offsets", "lengths"))
        try:
            check_boxes(record, offsets, lengths)
        except ValueError as error:
            raise _damaged(self._archive, error) from None
        return offsets, lengths

    def orders(self, rows: Int64s) -> None:
        """All chunks are in C order."""

    def places_of(self, leaf: int) -> tuple[Int64s, Int64s, Int64s]:
        """Return archive, position and bytes of all chunks of `leaves[leaf]`, int64 [rows]; raises as `places`."""
        record = self.leaves[leaf]
        rows = np.arange(*record.rows)
        if record.chunk_shape is not None:
            nbytes = np.full(rows.size, math.prod(record.chunk_shape) * record.itemsize, np.int64)
        else:
            nbytes = self.boxes(leaf)[1].prod(axis=1) * record.itemsize
        return *self.places(rows, nbytes), nbytes

    def check(self) -> None:
        """Read all rows; raises `CheckpointDamagedError` where any is not what it must be."""
        for leaf, record in enumerate(self.leaves):
            self.places_of(leaf)
            if not record.is_grid and not tiles(record.shape, *self.boxes(leaf)):
                error = ValueError(f"leaf {record.name}: its boxes overlap or leave elements out")
                raise _damaged(self._archive, error)


def open_layout(storage: StorageView, name: str, record: ArchiveRecord, fixed_nbytes: Sequence[int]) -> StoredRows:
    """Return the rows of a checkpoint; of a large file only the table of leaves is read now, all of it verified.

    `fixed_nbytes` are the sizes of the archives' fixed regions, in which all rows must lie.

    Raises `CheckpointDamagedError` naming the file where its bytes or its leaves are not what they must be.
    """
    archive = open_archive(storage, name, record)
    if archive.fixed_nbytes <= _WHOLE_NBYTES:
        archive = archive.holding()
    directory = read_directory(archive)
    text = open_column(archive, directory, "leaves", "uint8", differences=False)
    columns = {
        name: open_column(archive, directory, name, dtype, differences=differences)
        for name, (dtype, differences) in _COLUMNS.items()
    }
    try:
        # Compressed, a few bytes can claim anything: what is allocated is bounded by the archives that are there.
        room = sum(fixed_nbytes)
        most = min(_MAX_LEAVES_NBYTES, max(_LEAST_LEAVES_NBYTES, _LEAVES_RATIO * room))
        if text.size > most:
            raise ValueError(
                f"its table of leaves claims {text.size:,} bytes; with archives of {room:,} it has at most {most:,}"
            )
        leaves = leaves_from_json(json.loads(text.all_bytes()))
        rows, numbers = leaves[-1].rows[1] if leaves else 0, number_starts(leaves)[-1]
        if rows * _LEAST_CHUNK_NBYTES > room:
            raise ValueError(f"its leaves claim {rows:,} chunks, for which archives of {room:,} bytes have no room")
        for column, size in zip(columns.values(), (rows, rows, numbers, numbers), strict=True):
            if column.size != size:
                raise ValueError(f"column {column.name!r} has {column.size} numbers, the leaves have {size}")
    except (ValueError, RecursionError) as error:
        raise _damaged(archive, error) from None
    return StoredRows(archive, leaves, columns, np.asarray(fixed_nbytes, np.int64))


def _damaged(archive: Archive, error: Exception) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"{archive.location}: the layout is damaged: {error}; restore an older checkpoint")
