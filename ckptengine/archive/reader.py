"""Reading an archive: its tail, verified as a whole, and ranges of its fixed region, verified block by block."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.tail import checksums_of, document_of
from ckptengine.archive.zip import walk_entries
from ckptengine.errors import CheckpointDamagedError
from ckptengine.native.tables import NOTHING, ScatterPlan
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.base import StorageView

__all__ = ["Archive", "check_size", "open_archive"]


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive whose tail has been verified. `checksums` are uint32, one for each block of the fixed region.

    A file of another format, which has none, is one whose `checksums` are None: all of it is the fixed region, and
    nothing of it can be verified.

    `held` is the verified fixed region, uint8, where it is kept in memory (`holding`).
    """

    storage: StorageView
    name: str
    fixed_nbytes: int
    checksums: NDArray[np.uint32] | None
    tail: dict[str, bytes]
    tail_bytes: bytes
    held: NDArray[np.uint8] | None = None

    @property
    def location(self) -> str:
        """The file, as messages name it."""
        return self.storage.location(self.name)

    def attributes(self, node: str) -> dict[str, Any]:
        """Return the `ckptengine` attributes of a group in the tail.

        Raises `CheckpointDamagedError` where there is no such group.
        """
        document = document_of(self.tail, f"{node}/zarr.json", self.location)
        attributes = document.get("attributes")
        ours = attributes.get("ckptengine") if isinstance(attributes, dict) else None
        if not isinstance(ours, dict):
            raise CheckpointDamagedError(f"{self.location}: group {node!r} has no attributes of this format")
        return ours

    def load(self, ranges: NDArray[np.int64], plan: ScatterPlan) -> None:
        """Read ranges (rows of position and bytes) of whole blocks, verify them, and scatter them to memory.

        Raises `CheckpointDamagedError` naming file and place of the first damaged block.
        """
        block = self._load(ranges, plan)
        if block is not None:
            raise CheckpointDamagedError(self.damage(*block))

    def damaged(self, position: int, nbytes: int) -> tuple[int, int] | None:
        """Return start and stop of the first damaged block in a range of whole blocks, None where all are well."""
        ranges = np.array([[position, nbytes]], np.int64)
        return self._load(ranges, NOTHING)

    def damage(self, start: int, stop: int) -> str:
        """Return what to say of damaged bytes."""
        if self.checksums is None:
            return f"{self.location}: ends before byte {stop}, it had {self.fixed_nbytes} bytes when it was opened"
        return f"{self.location}: bytes {start} to {stop} are not those that were written (CRC32 differs)"

    def _load(self, ranges: NDArray[np.int64], plan: ScatterPlan) -> tuple[int, int] | None:
        read = ArchiveRead(self.fixed_nbytes, BLOCK_NBYTES, self.checksums, ranges, plan)
        block = self.storage.load_archive(self.name, read)
        if block < 0:
            return None
        start = block * BLOCK_NBYTES
        return start, min(start + BLOCK_NBYTES, self.fixed_nbytes)

    def read_into(self, position: int, address: int, nbytes: int) -> None:
        """Read bytes of the fixed region into memory, verified.

        Raises `CheckpointDamagedError` naming file and place of the first damaged block.
        """
        self._copy(np.array([position], np.int64), np.array([nbytes], np.int64), np.array([address], np.int64))

    def read(self, position: int, nbytes: int) -> bytes:
        """Return bytes of the fixed region, verified; raises `CheckpointDamagedError` where they are damaged."""
        return self.gather(np.array([position], np.int64), np.array([nbytes], np.int64)).tobytes()

    def gather(self, positions: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return bytes of several places of the fixed region, one after the other, uint8, verified.

        `positions` ascend; `sizes` are in bytes. Raises `CheckpointDamagedError` where they are damaged.
        """
        outside = (positions < 0) | (sizes < 0) | (sizes > self.fixed_nbytes) | (positions > self.fixed_nbytes - sizes)
        if outside.any():
            place = int(np.argmax(outside))
            raise CheckpointDamagedError(
                f"{self.location}: {sizes[place]} bytes at {positions[place]} lie outside of the fixed region"
            )
        if self.held is not None:
            spans = zip(positions.tolist(), sizes.tolist(), strict=True)
            return np.concatenate([self.held[:0], *(self.held[start : start + size] for start, size in spans)])
        out = np.empty(int(sizes.sum()), np.uint8)
        address = out.ctypes.data + np.cumsum(sizes) - sizes
        self._copy(positions, sizes, address)
        return out

    def holding(self) -> Archive:
        """Return the archive with its fixed region in memory, read and verified once: for small ones."""
        return replace(self, held=self.gather(np.zeros(1, np.int64), np.array([self.fixed_nbytes], np.int64)))

    def _copy(self, positions: NDArray[np.int64], sizes: NDArray[np.int64], addresses: NDArray[np.int64]) -> None:
        """Read bytes of several places, which ascend, to as many addresses; all arrays int64, one item for a place."""
        there = sizes > 0
        positions, sizes, addresses = positions[there], sizes[there], addresses[there]
        if positions.size:
            plan = ScatterPlan.of_bytes(positions, sizes, addresses)
            self.load(self._blocks(positions, positions + sizes), plan)

    def _blocks(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ranges (position, bytes) of whole blocks that hold these bytes; `begins` ascend."""
        begins = begins // BLOCK_NBYTES * BLOCK_NBYTES
        reach = np.maximum.accumulate(-(-ends // BLOCK_NBYTES) * BLOCK_NBYTES)
        new = np.flatnonzero(np.append(True, begins[1:] > reach[:-1]))
        stops = np.minimum(np.append(reach[new[1:] - 1], reach[-1]), self.fixed_nbytes)
        return np.stack([begins[new], stops - begins[new]], axis=1)


def check_size(storage: StorageView, name: str, record: ArchiveRecord) -> None:
    """Check that a file is there with the size of its record; raises `CheckpointDamagedError` naming it."""
    size = storage.size(name)
    if size != record.nbytes:
        found = "the file is missing" if size is None else f"{size} bytes long, {record.nbytes} expected"
        raise CheckpointDamagedError(f"{storage.location(name)}: {found}")


def open_archive(storage: StorageView, name: str, record: ArchiveRecord) -> Archive:
    """Return an archive after verifying its size and its tail against the manifest's record.

    `name` is the file, relative to the storage. Raises `CheckpointDamagedError` naming the file.
    """
    where = storage.location(name)
    check_size(storage, name, record)
    tail = storage.read_range(name, record.tail_position, record.nbytes - record.tail_position)
    if hashlib.sha256(tail).hexdigest() != record.tail_sha256:
        raise CheckpointDamagedError(
            f"{where}: the tail (from byte {record.tail_position} on) is not what was written (SHA-256 differs)"
        )
    entries = walk_entries(tail, where)
    checksums = checksums_of(entries, record.name, record.tail_position, where)
    return Archive(storage, name, record.tail_position, checksums, entries, tail)
