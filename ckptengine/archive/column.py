"""A column of the layout file: integers in small compressed chunks that lie in one entry, with an index of them.

One entry, and not one for each chunk, because a layout of 16,384 ranks has thousands of chunks of some tens of
bytes, whose ZIP headers would take several times their room and would have to be parsed to find one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.archive.directory import DirectoryEntry, entry_position, read_entry
from ckptengine.archive.image import array_metadata
from ckptengine.archive.reader import Archive
from ckptengine.errors import CheckpointDamagedError

__all__ = ["MAX_CHUNK_ITEMS", "Column", "encode_column", "open_column"]

MAX_CHUNK_ITEMS = 1 << 16
"""Integers per chunk at most: bounds what a reader allocates for one."""

_LEVEL = 1  # the columns are regular; higher levels gain next to nothing and cost time on the coordinator
_BATCH_NBYTES = 8 << 20  # compressed bytes that are fetched at a time: bounds the memory, whatever is wanted
_INDEX_NBYTES = 16  # per chunk, two uint64: where it starts in the entry, and its bytes

Integers = NDArray[Any]


def encode_column(values: Integers, chunk_items: int, *, differences: bool) -> tuple[bytes, bytes]:
    """Return the `zarr.json` of a 1-D integer array and the bytes of its one shard, `c/0` (empty without values).

    Chunks have `chunk_items` values, the last is padded with zeros. With `differences`, all but the first value of
    each chunk are stored as the difference from the value before.
    """
    items = max(1, min(chunk_items, values.size))
    count = -(-values.size // items)
    codec = _zstd(_LEVEL)
    chunk = np.zeros(items, values.dtype.newbyteorder("<"))
    parts, sizes = [], np.zeros(count, np.int64)
    for number in range(count):
        part = values[number * items : (number + 1) * items]
        chunk[: part.size] = part
        chunk[part.size :] = 0
        if differences:
            np.subtract(part[1:], part[:-1], out=chunk[1 : part.size])
        parts.append(bytes(codec.encode(chunk)))
        sizes[number] = len(parts[-1])
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8")
    zstd = {"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [items],
            "codecs": [raw, zstd],
            "index_codecs": [raw],
            "index_location": "end",
        },
    }
    metadata = array_metadata(values.shape, [max(1, count) * items], values.dtype.name, 0, serializer=sharding)
    return metadata, b"".join([*parts, index.tobytes()])


@dataclass(frozen=True, slots=True)
class Column:
    """A column whose chunks are read when they are wanted; `size` is its number of values.

    `starts` (byte of the archive) and `sizes` (int64, bytes) say where each chunk of `chunk_items` values lies.
    """

    archive: Archive
    name: str
    dtype: np.dtype[Any]
    size: int
    chunk_items: int
    differences: bool
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def take(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the values at these places (int64 [n], in any order, in range) as int64; reads their chunks only."""
        result = np.zeros(places.size, np.int64)
        order = np.argsort(places, kind="stable")
        chunks, begins = np.unique(places[order] // self.chunk_items, return_index=True)
        bounds = itertools.pairwise(np.append(begins, places.size).tolist())
        summed = np.empty(self.chunk_items, np.int64)
        for values, number, (begin, end) in zip(self._decoded(chunks), chunks.tolist(), bounds, strict=True):
            inside = places[order[begin:end]] - number * self.chunk_items
            if self.differences:
                length = int(inside[-1]) + 1
                values = np.cumsum(values[:length], out=summed[:length])
            result[order[begin:end]] = values[inside]
        return result

    def all_bytes(self) -> bytes:
        """Return a whole column of bytes."""
        return b"".join(values.tobytes() for values in self._decoded(np.arange(self.starts.size)))[: self.size]

    def _decoded(self, chunks: NDArray[np.int64]) -> Iterator[Integers]:
        """Yield what these chunks store, each in the memory of the one before: fresh memory is slow to touch."""
        raw = np.empty(self.chunk_items, self.dtype)
        codec = _zstd()
        for batch in self._batches(chunks):
            sizes = self.sizes[batch]
            order = np.argsort(self.starts[batch], kind="stable")
            data = self.archive.gather(self.starts[batch][order], sizes[order])
            begins = np.zeros_like(sizes)
            begins[order] = np.cumsum(sizes[order]) - sizes[order]
            for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
                frame = data[begin : begin + size]
                try:
                    if _content_nbytes(frame[:18].tobytes()) != raw.nbytes:
                        raise ValueError(f"a chunk does not hold {raw.nbytes} bytes")
                    codec.decode(frame, raw)
                except (ValueError, RuntimeError) as error:
                    raise unreadable(self.archive, self.name, error) from None
                yield raw

    def _batches(self, chunks: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Cut the chunks so that each batch has about `_BATCH_NBYTES` compressed bytes."""
        number = np.cumsum(self.sizes[chunks]) // _BATCH_NBYTES
        yield from np.split(chunks, np.flatnonzero(np.diff(number)) + 1) if chunks.size else ()


def open_column(
    archive: Archive, directory: dict[str, DirectoryEntry], name: str, dtype: str, *, differences: bool
) -> Column:
    """Return the column `layout/<name>` of an archive with this directory, its metadata and index verified.

    Raises `CheckpointDamagedError` where they are not those of a column of this type; allocates nothing by what
    they claim.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        node = f"layout/{name}"
        entry = directory[f"{node}/zarr.json"]
        metadata = json.loads(read_entry(archive, f"{node}/zarr.json", entry, 0, entry.nbytes))
        (size,), (shard_items,) = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        (codec,) = metadata["codecs"]
        (items,) = codec["configuration"]["chunk_shape"]
        if metadata["data_type"] != dtype:
            raise ValueError(f"data type {metadata['data_type']!r:.40} instead of {dtype}")
        if not all(type(number) is int for number in (size, items, shard_items)) or size < 0:
            raise ValueError("not a column of integers")
        if not 1 <= items <= MAX_CHUNK_ITEMS or shard_items != max(1, -(-size // items)) * items:
            raise ValueError(f"chunks of {items} in shards of {shard_items} are not those of {size} values")
        count = -(-size // items)
        data = directory[f"{node}/c/0"]
        if data.nbytes < count * _INDEX_NBYTES:
            raise ValueError(f"{data.nbytes} bytes have no room for the index of {count} chunks")
        end = data.nbytes - count * _INDEX_NBYTES
        index = np.frombuffer(read_entry(archive, f"{node}/c/0", data, end, data.nbytes), "<u8").reshape(-1, 2)
        starts, sizes = index[:, 0], index[:, 1]
        # zstd adds little to what it can't compress, so a longer chunk is none of ours.
        most = items * kind.itemsize + (items * kind.itemsize >> 7) + 128
        if ((sizes < 1) | (sizes > most) | (sizes > end) | (starts > end - np.minimum(sizes, end))).any():
            raise ValueError("its index leads out of it")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise unreadable(archive, name, error) from None
    base = entry_position(archive, f"{node}/c/0", data)
    places = starts.astype(np.int64) + base
    return Column(archive, name, kind, size, items, differences, places, sizes.astype(np.int64))


def unreadable(archive: Archive, name: str, error: Exception) -> CheckpointDamagedError:
    """Return what to raise where a column is not what it must be."""
    return CheckpointDamagedError(f"{archive.location}: column {name!r} is unreadable: {error!r}")


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


def _zstd(level: int = 0) -> Any:
    """Return the codec of Zarr's `zstd`; importing numcodecs takes as long as importing numpy."""
    from numcodecs.zstd import Zstd

    return Zstd(level=level)
