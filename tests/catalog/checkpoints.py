"""Small real checkpoints for the tests of the catalog."""

import hashlib
import json
import mmap

import numpy as np

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory, publish
from ckptengine.catalog.listing import step_directory
from ckptengine.catalog.manifest import Manifest
from ckptengine.storage.base import join

MEMORY = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
TAIL = hashlib.sha256(bytes(4096)).hexdigest()


def manifest_of(step, generation=1, parent=None, attempt=None, world_size=2, nbytes=8192, **fields):
    return Manifest(
        step=step,
        generation=generation,
        parent=parent,
        attempt=attempt or f"{generation:012x}-{step or 0}",
        world_size=world_size,
        block_nbytes=65536,
        archives=tuple(ArchiveRecord(f"rank-{r:05d}.zarr.zip", nbytes, 4096, TAIL) for r in range(world_size)),
        layout=ArchiveRecord("layout.zarr.zip", 4096, 0, TAIL),
        **fields,
    )


def directory_of(manifest):
    return "" if manifest.step is None else step_directory(manifest.step)


def write_data(storage, manifest):
    """Write the files of an attempt, filled with a byte that tells the generation and step."""
    data = attempt_directory(directory_of(manifest), manifest.attempt)
    MEMORY[:] = (manifest.generation * 16 + (manifest.step or 0)) % 256
    for record in manifest.archives:
        with storage.create_archive(join(data, record.name), record.nbytes) as archive:
            archive.write(MEMORY.ctypes.data, record.nbytes, 0)
            archive.finish()
    storage.write_bytes(join(data, manifest.layout.name), bytes(MEMORY[: manifest.layout.nbytes]))


def write_checkpoint(storage, step, generation=1, parent=None, **fields):
    """Write and commit a checkpoint, and return its manifest."""
    manifest = manifest_of(step, generation, parent, **fields)
    write_data(storage, manifest)
    publish(storage, directory_of(manifest), manifest)
    return manifest


def signed_document(**document):
    """Return the bytes of a manifest with these fields alone, and the digest that fits them."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return json.dumps(document | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()
