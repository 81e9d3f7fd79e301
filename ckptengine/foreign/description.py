"""What a checkpoint of another library holds, as the loader plans from it: leaves, and where their bytes lie."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointDamagedError
from ckptengine.layout.rows import LeafRecord, RowTable, check_boxes, check_places, leaves_from_json, leaves_to_json
from ckptengine.layout.tiling import Int64s, linear
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.head import MAX_LEAF_NBYTES, MAX_NDIM, is_zero_sized, zero_sized_chunk
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, dotted, path_order
from ckptengine.state.forms import Form
from ckptengine.state.values import decode, encode

__all__ = ["Description", "ForeignFile", "ForeignLeaf", "Order", "Piece", "describe_leaves"]

_MOST_REPEATED = 8
"""Bytes of arrays for each byte of the files, at most: expanded tensors and overlapping views are stored once."""
_FREE_NBYTES = 64 << 20

Order = tuple[int, ...]
"""The dimensions of a stored tensor from the outermost in the file to the innermost, where that is not C order."""


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """A file that holds tensors: its name within the storage, and its bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a leaf that lies in one piece in file number `file`, from byte `position` on.

    `blob_nbytes` is 0, or tells that the bytes are those of a serialized tensor, of so many bytes in all, in which the
    elements have to be looked for.
    """

    box: Box
    file: int
    position: int
    blob_nbytes: int = 0
    order: Order | None = None


@dataclass(frozen=True, slots=True)
class ForeignLeaf:
    """A tensor: its path, logical dtype, global shape and the pieces that it is made of, in any order."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Description:
    """A checkpoint of another library.

    `format` is its name in messages. `table` has the leaves, the file of each row as its archive, and where its bytes
    start; `blobs` are None, or the bytes of the serialized tensor that each row is in. `orders` has the rows that are
    not stored in C order. `values` are plain values, `aliases` paths that are the same tensor as another. With `flat`
    the names are text, whose dots may or may not divide keys: the state to be filled decides. `metadata` is what the
    writer noted. `unread` says what lies at some paths that is neither an array nor a plain value.
    """

    format: str
    files: tuple[ForeignFile, ...]
    table: RowTable
    blobs: Int64s | None = field(default=None, compare=False)
    orders: Mapping[int, Order] = field(default_factory=dict)
    values: Mapping[Path, Any] = field(default_factory=dict)
    aliases: Mapping[Path, Path] = field(default_factory=dict)
    containers: Mapping[Path, Form] = field(default_factory=dict)
    flat: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[Path, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the description for other ranks."""
        columns = [self.table.archive.astype("<i8"), self.table.position, self.table.offsets, self.table.lengths]
        columns += [] if self.blobs is None else [self.blobs]
        head = {
            "format": self.format,
            "files": [[one.name, one.nbytes] for one in self.files],
            "leaves": leaves_to_json(self.table.leaves),
            "orders": [[row, list(order)] for row, order in self.orders.items()],
            "values": [[list(path), encode(value, path)] for path, value in self.values.items()],
            "aliases": [[list(path), list(first)] for path, first in self.aliases.items()],
            "containers": [[list(path), form] for path, form in self.containers.items()],
            "flat": self.flat,
            "metadata": dict(self.metadata),
            "unread": [[list(path), name] for path, name in self.unread.items()],
            "columns": [int(column.size) for column in columns],
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        data = b"".join(column.astype("<i8").tobytes() for column in columns)
        return zlib.compress(len(text).to_bytes(8, "little") + text + data, 1)

    @classmethod
    def decode(cls, data: bytes) -> Description:
        """Return the description that `encode` made on another rank of this job."""
        data = zlib.decompress(data)
        stop = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:stop])
        ends = np.cumsum([0, *head["columns"]])
        numbers = np.frombuffer(data, "<i8", offset=stop).astype(np.int64)
        columns = [numbers[begin:end] for begin, end in itertools.pairwise(ends)]
        table = RowTable(leaves_from_json(head["leaves"]), columns[0].astype(np.int32), *columns[1:4])
        return cls(
            format=head["format"],
            files=tuple(ForeignFile(name, nbytes) for name, nbytes in head["files"]),
            table=table,
            blobs=columns[4] if len(columns) > 4 else None,
            orders={row: tuple(order) for row, order in head["orders"]},
            values={tuple(path): decode(value) for path, value in head["values"]},
            aliases={tuple(path): tuple(first) for path, first in head["aliases"]},
            containers={tuple(path): form for path, form in head["containers"]},
            flat=head["flat"],
            metadata=head["metadata"],
            unread={tuple(path): name for path, name in head["unread"]},
        )


def describe_leaves(
    leaves: Iterable[ForeignLeaf], files: Sequence[ForeignFile], container: str, where: str
) -> tuple[RowTable, Int64s | None, dict[int, Order]]:
    """Return the table of some leaves, the bytes of the blobs that their rows are in, and the rows' orders.

    `container` is the framework that they are of. Raises `CheckpointDamagedError`, naming `where` and the leaf, for
    what no tensor can be: too many dimensions, sizes out of range, pieces that leave the shape or the file, names that
    come twice.
    """
    found = sorted(leaves, key=lambda leaf: path_order(leaf.path))
    for before, after in itertools.pairwise(found):
        if before.path == after.path:
            raise CheckpointDamagedError(f"{where}: the name {dotted(after.path)!r} comes twice")
    records: list[LeafRecord] = []
    pieces: list[Piece] = []
    nbytes: list[int] = []
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    try:
        for leaf in found:
            _check_shape(leaf)
            rows = _in_order(leaf)
            whole = is_zero_sized(leaf.shape) or [one.box for one in rows] == [Box.whole(leaf.shape)]
            chunk = zero_sized_chunk(leaf.shape) if whole else None
            if is_zero_sized(leaf.shape):
                rows = []
            span = (len(pieces), len(pieces) + len(rows))
            record = LeafRecord(leaf.path, leaf.dtype, leaf.shape, Placement.REPLICATED, container, chunk, None, span)
            if chunk is None:
                ndim = (len(rows), len(leaf.shape))
                offsets = np.array([one.box.offset for one in rows], np.int64).reshape(ndim)
                lengths = np.array([one.box.shape for one in rows], np.int64).reshape(ndim)
                check_boxes(record, offsets, lengths)
                boxes += [(one.box.offset, one.box.shape) for one in rows]
            records.append(record)
            pieces += rows
            nbytes += [one.blob_nbytes or one.box.volume * record.itemsize for one in rows]
        _check_room(records, sum(one.nbytes for one in files))
        archive = np.array([one.file for one in pieces], np.int64)
        position = np.array([one.position for one in pieces], np.int64)
        check_places(archive, position, np.array(nbytes, np.int64), np.array([one.nbytes for one in files], np.int64))
    except (ValueError, OverflowError) as error:
        raise CheckpointDamagedError(f"{where}: {error}") from None
    table = RowTable(
        tuple(records),
        archive.astype(np.int32),
        position,
        np.array([number for offset, _ in boxes for number in offset], np.int64),
        np.array([number for _, lengths in boxes for number in lengths], np.int64),
    )
    blobs = np.array([one.blob_nbytes for one in pieces], np.int64)
    orders = {row: one.order for row, one in enumerate(pieces) if one.order is not None}
    return table, blobs if blobs.any() else None, orders


def _check_room(records: Sequence[LeafRecord], nbytes: int) -> None:
    """Raise `ValueError` where arrays would take far more memory than there are bytes: views may repeat some."""
    claimed = sum(math.prod(record.shape) * record.itemsize for record in records)
    if claimed > _FREE_NBYTES + _MOST_REPEATED * nbytes:
        raise ValueError(f"its arrays would take {claimed:,} bytes, its files have {nbytes:,}")


def _check_shape(leaf: ForeignLeaf) -> None:
    """Raise `ValueError` for a shape that no tensor has."""
    name = dotted(leaf.path)
    if len(leaf.shape) > MAX_NDIM:
        raise ValueError(f"{name}: {len(leaf.shape)} dimensions, {MAX_NDIM} are the most")
    if any(type(length) is not int or not 0 <= length <= MAX_LEAF_NBYTES for length in leaf.shape):
        raise ValueError(f"{name}: the shape {leaf.shape} has a length out of range")
    if math.prod(zero_sized_chunk(leaf.shape)) * DTYPES[leaf.dtype].itemsize > MAX_LEAF_NBYTES:
        raise ValueError(f"{name}: the shape {leaf.shape} is larger than any tensor can be")


def _in_order(leaf: ForeignLeaf) -> list[Piece]:
    """Return a leaf's pieces by their place in it."""
    ndim = len(leaf.shape)
    if any(len(one.box.offset) != ndim or len(one.box.shape) != ndim for one in leaf.pieces):
        raise ValueError(f"{dotted(leaf.path)}: a piece has other dimensions than the shape {leaf.shape}")
    if len(leaf.pieces) < 2:
        return list(leaf.pieces)
    offsets = np.array([one.box.offset for one in leaf.pieces], np.int64).reshape(-1, ndim)
    return [leaf.pieces[number] for number in np.argsort(linear(leaf.shape, offsets), kind="stable").tolist()]
