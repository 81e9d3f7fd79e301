"""Checkpoints whose digests are right and whose content is not: what an attacker can write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ckptengine.archive import layout_file
from ckptengine.archive.layout_file import encode_layout
from ckptengine.archive.names import checksums_node
from ckptengine.archive.zip import parse_local_header
from ckptengine.layout.rows import RowTable
from ckptengine.load.choose import newest_checkpoint
from ckptengine.storage.local import LocalStorage


def manifest_path(place: Path) -> Path:
    return next(place.glob("manifest-*.json"))


def data_path(place: Path) -> Path:
    return next(place.glob("data-*"))


def write_manifest(place: Path, document: dict[str, Any]) -> None:
    """Write a manifest with the digest that fits it."""
    document = {name: value for name, value in document.items() if name != "sha256"}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    write_manifest_text(place, text)


def write_manifest_text(place: Path, text: str) -> None:
    """Add the digest to a manifest that is given as text, without its digest; it must end with a brace."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    # Sorted names: the digest's place is before step and world_size, but a reader sorts them anew.
    manifest_path(place).write_text(f'{text[:-1]},"sha256":"{digest}"}}')


def change_manifest(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest, with a digest that fits."""
    document = json.loads(manifest_path(place).read_text())
    change(document)
    write_manifest(place, document)


def change_tail(place: Path, change: Callable[[bytearray], Any], name: str = "rank-00000.zarr.zip") -> None:
    """Change the tail of an archive, with a manifest that fits."""
    document = json.loads(manifest_path(place).read_text())
    record = next(r for r in (document["layout"], *document["archives"]) if r["name"] == name)
    path = data_path(place) / name
    data = path.read_bytes()
    tail = bytearray(data[record["tail_position"] :])
    change(tail)
    path.write_bytes(data[: record["tail_position"]] + tail)
    record.update(nbytes=record["tail_position"] + len(tail), tail_sha256=hashlib.sha256(tail).hexdigest())
    write_manifest(place, document)


def change_values(place: Path, change: Callable[[dict[str, Any]], Any], node: str = "objects") -> None:
    """Change the plain values that an archive's tail holds."""

    def rewrite(tail: bytearray) -> None:
        start, nbytes = entry_of(bytes(tail), f"{node}/zarr.json")
        document = json.loads(tail[start : start + nbytes])
        change(document["attributes"]["ckptengine"])
        replace_entry(tail, f"{node}/zarr.json", json.dumps(document).encode())

    change_tail(place, rewrite)


def entry_of(tail: bytes, name: str) -> tuple[int, int]:
    """Return position and bytes of an entry's data in a tail."""
    position = 0
    while header := parse_local_header(tail, position, "the tail"):
        if header.name == name:
            return header.data_position, header.nbytes
        position = header.data_position + header.nbytes + 24
    raise KeyError(name)


def replace_entry(tail: bytearray, name: str, data: bytes) -> None:
    """Put other bytes into an entry: the lengths in its header and descriptor follow, the directory does not."""
    start, nbytes = entry_of(bytes(tail), name)
    old, new = nbytes.to_bytes(8, "little"), len(data).to_bytes(8, "little")
    head = bytes(tail[:start])
    at = head.rindex(old * 2)
    end = bytes(tail[start + nbytes : start + nbytes + 24])
    tail[:] = head[:at] + new * 2 + head[at + 16 :] + data + end[:8] + new * 2 + tail[start + nbytes + 24 :]


def change_rows(place: Path, change: Callable[[RowTable], RowTable]) -> None:
    """Write another layout file, whole and with digests that fit."""
    write_layout(place, *encode_layout(change(table_of(place))))


def table_of(place: Path) -> RowTable:
    """Return all rows of a checkpoint."""
    rows = newest_checkpoint(LocalStorage(place)).rows
    numbers = range(len(rows.leaves))
    places = [rows.places_of(number) for number in numbers]
    boxes = [rows.boxes(number) for number in numbers if not rows.leaves[number].is_grid]
    empty = np.zeros(0, np.int64)
    return RowTable(
        rows.leaves,
        np.concatenate([empty, *(archive for archive, _, _ in places)]).astype(np.int32),
        np.concatenate([empty, *(position for _, position, _ in places)]),
        *(np.concatenate([empty, *(pair[column].reshape(-1) for pair in boxes)]) for column in (0, 1)),
    )


def change_columns(place: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write a layout file whose entries are changed, given name and bytes of each, with digests that fit."""
    original = layout_file.plan_entries
    rows = table_of(place)
    try:
        layout_file.plan_entries = lambda name, entries: original(  # type: ignore[assignment]
            name, [(entry, change(entry, data)) for entry, data in entries]
        )
        layout = encode_layout(rows)
    finally:
        layout_file.plan_entries = original
    write_layout(place, *layout)


def write_layout(place: Path, data: bytes, record: Any) -> None:
    (data_path(place) / record.name).write_bytes(data)
    changed = {name: getattr(record, name) for name in ("name", "nbytes", "tail_position", "tail_sha256")}
    change_manifest(place, lambda document: document.update(layout=changed))


def with_column(rows: RowTable, name: str, number: int, value: int) -> RowTable:
    """Return rows with one number changed."""
    column = np.array(getattr(rows, name))
    column[number] = value
    return replace(rows, **{name: column})


def with_leaf(table: RowTable, number: int, **changes: Any) -> RowTable:
    """Return rows with one leaf changed."""
    leaves = list(table.leaves)
    leaves[number] = replace(leaves[number], **changes)
    return replace(table, leaves=tuple(leaves))


def as_fragments(table: RowTable) -> RowTable:
    """Return rows in which leaf 0, one chunk, is a group of one fragment instead: the same bytes, with a box."""
    shape = np.asarray(table.leaves[0].shape, np.int64)
    changed = with_leaf(table, 0, chunk_shape=None)
    return replace(
        changed,
        offsets=np.concatenate([np.zeros_like(shape), table.offsets]),
        lengths=np.concatenate([shape, table.lengths]),
    )


CHECKSUMS = checksums_node("rank-00000.zarr.zip")
