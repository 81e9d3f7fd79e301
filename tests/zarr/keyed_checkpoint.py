"""Checkpoints whose archive holds given Zarr keys, whatever they are."""

import hashlib
import secrets
import zipfile
from pathlib import Path

import numpy as np

import ckptengine._native as _native
from ckptengine.archive.image import BLOCK_NBYTES, plan_entries
from ckptengine.archive.layout_file import encode_layout
from ckptengine.archive.names import archive_name
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.tail import build_tail
from ckptengine.catalog.listing import manifest_name, next_generation
from ckptengine.catalog.manifest import Manifest
from ckptengine.layout.merge import merge
from ckptengine.storage.local import LocalStorage


def write(directory: Path, entries: dict[str, bytes]) -> None:
    """Commit a checkpoint, newer than those that are there.

    A key that each archive has anyway, `zarr.json`, comes twice then, and the later one counts.
    """
    image = plan_entries(archive_name(0), entries.items())
    fixed = np.zeros(image.fixed_nbytes, np.uint8)
    for position, data in image.static:
        fixed[position : position + len(data)] = np.frombuffer(data, np.uint8)
    blocks = [_native.crc32(fixed[start : start + BLOCK_NBYTES]) for start in range(0, fixed.size, BLOCK_NBYTES)]
    tail = build_tail(image, [], np.zeros(0, np.uint32), np.array(blocks, np.uint32))
    record = ArchiveRecord(image.name, fixed.size + len(tail), fixed.size, hashlib.sha256(tail).hexdigest())
    layout, layout_record = encode_layout(merge([]))

    storage, attempt = LocalStorage(directory), secrets.token_hex(4)
    storage.make_directory(f"data-{attempt}")
    storage.write_bytes(f"data-{attempt}/{record.name}", fixed.tobytes() + tail)
    storage.write_bytes(f"data-{attempt}/{layout_record.name}", layout)
    generation = next_generation(storage)
    manifest = Manifest(None, generation, None, attempt, 1, BLOCK_NBYTES, (record,), layout_record)
    assert storage.put_if_absent(manifest_name(generation), manifest.encode())


def read(directory: Path) -> dict[str, bytes]:
    """Return the keys and values of the newest checkpoint's archive, through `zipfile`."""
    newest = max(directory.glob("manifest-*.json"))
    attempt = Manifest.decode(newest.read_bytes(), str(newest)).attempt
    with zipfile.ZipFile(directory / f"data-{attempt}" / archive_name(0)) as content:
        return {name: content.read(name) for name in content.namelist()}
