"""Zarr v3: one plain hierarchy, as a directory or as one ZIP, with plain values in the attributes of its root."""

from __future__ import annotations

import itertools
import math
from typing import Any

from ckptengine.archive.image import array_metadata, group_metadata
from ckptengine.archive.names import chunk_key, escape
from ckptengine.errors import ForeignFormatError, StateError
from ckptengine.export.contents import Contents, Item
from ckptengine.export.stream import FilePlan
from ckptengine.export.zip_file import plan_zip
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.head import zero_sized_chunk
from ckptengine.schema.path import Path
from ckptengine.state.values import encode

__all__ = ["plan_zarr"]

CHUNK_NBYTES = 64 << 20
"""Bytes of a chunk at most, where an array can be cut into that."""

Entry = tuple[str, list[bytes | Item]]


def plan_zarr(name: str | None, contents: Contents) -> tuple[list[FilePlan], list[tuple[str, bytes]]]:
    """Return the plans of the chunks, and the metadata, that of the root last; with a name, of one ZIP.

    Raises `ForeignFormatError` naming a value that has no JSON.
    """
    metadata, chunks = _entries(contents)
    if name is not None:
        entries: list[Entry] = [(key, [data]) for key, data in (metadata[-1], *metadata[:-1])]
        return [plan_zip(name, [*entries, *chunks])], []
    return [FilePlan(key, tuple(segments)) for key, segments in chunks], metadata


def _entries(contents: Contents) -> tuple[list[tuple[str, bytes]], list[Entry]]:
    groups: dict[str, bytes] = {}
    metadata: list[tuple[str, bytes]] = []
    chunks: list[Entry] = []
    seen: set[str] = set()
    for item in contents.items:
        keys = [escape(key) for key in item.path]
        for depth in range(1, len(keys)):
            groups.setdefault("/".join(keys[:depth]), group_metadata())
        node = "/".join(keys)
        seen.add(node)
        dtype = DTYPES[item.dtype]
        chunk = _chunk_shape(item.shape, dtype.itemsize)
        attributes = {"dtype": item.dtype} if dtype.encoded else None
        metadata.append((f"{node}/zarr.json", array_metadata(item.shape, chunk, dtype.zarr, dtype.fill, attributes)))
        chunks += _chunks(item, node, chunk)
    both = seen & groups.keys()
    if both:
        raise ForeignFormatError(f"{min(both)}: an array, and a group that has arrays; use `rename`")
    attributes = _attributes(contents)
    metadata = [*((f"{group}/zarr.json", data) for group, data in groups.items()), *metadata]
    return [*metadata, ("zarr.json", group_metadata(attributes))], chunks


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the whole shape where it is small enough, else as many rows of the first dimensions as fit."""
    chunk = list(zero_sized_chunk(shape))
    for dim in range(len(chunk)):
        row = math.prod(chunk[dim + 1 :]) * itemsize
        if row * chunk[dim] <= CHUNK_NBYTES:
            break
        chunk[dim] = max(1, CHUNK_NBYTES // row)
    return tuple(chunk)


def _chunks(item: Item, node: str, chunk: tuple[int, ...]) -> list[Entry]:
    """Return the entries of an array's chunks; those at an edge are filled up with zeros, as Zarr wants."""
    if 0 in item.shape:
        return []
    counts = [-(-length // step) for length, step in zip(item.shape, chunk, strict=True)]
    entries: list[Entry] = []
    for cell in itertools.product(*map(range, counts)):
        offset = tuple(number * step for number, step in zip(cell, chunk, strict=True))
        lengths = tuple(min(step, n - o) for step, n, o in zip(chunk, item.shape, offset, strict=True))
        part = Item(item.path, item.leaf, item.stored, item.dtype, item.shape, Box(offset, lengths))
        # Only the dimension that is cut can be short, and all before it have one row: the rest is at the end.
        missing = math.prod(chunk) * item.itemsize - part.nbytes
        entries.append((chunk_key(node, cell), [part, bytes(missing)] if missing else [part]))
    return entries


def _attributes(contents: Contents) -> dict[str, Any] | None:
    """Return the plain values as nested JSON: what JSON has not in the tagged form of our own format."""
    if not contents.values and not contents.aliases:
        return None
    nested: dict[str, Any] = {}

    def put(path: Path, value: Any) -> None:
        place = nested
        for key in path[:-1]:
            place = place.setdefault(str(key), {})
        place[str(path[-1])] = value

    for path, value in contents.values.items():
        try:
            put(path, encode(value, path))
        except (StateError, AttributeError) as error:
            raise ForeignFormatError(f"{'.'.join(map(str, path))}: has no JSON: {error}") from None
    result: dict[str, Any] = {"values": nested}
    if contents.aliases:
        result["aliases"] = [[list(path), list(first)] for path, first in contents.aliases.items()]
    return result
