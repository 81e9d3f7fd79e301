"""A read-only Zarr store over all archives of one checkpoint."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Iterable
from typing import Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from ckptengine.archive.directory import DirectoryEntry, read_directory, read_entry
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.load.choose import newest_checkpoint
from ckptengine.storage.open import open_storage

__all__ = ["CheckpointStore", "tensorstore_spec"]


class CheckpointStore(Store):
    """The archives of a checkpoint as one Zarr v3 store.

    The directories of the archives are read at the first access, chunks when they are asked for; what is read is
    verified block by block. `path` is a run or a checkpoint directory: the checkpoint that is newest when the
    store is opened.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, checkpoint: Checkpoint, *, read_only: bool = True) -> None:
        if not read_only:
            raise ValueError("a checkpoint is never changed in place: open it with read_only=True, save a new one")
        super().__init__(read_only=True)
        self._checkpoint = checkpoint

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> CheckpointStore:
        """Return the store of the newest checkpoint at a path."""
        return cls(newest_checkpoint(open_storage(path)))

    @functools.cached_property
    def _entries(self) -> dict[str, tuple[int, DirectoryEntry]]:
        """Which archive holds each key; metadata that several hold is the same in all."""
        entries: dict[str, tuple[int, DirectoryEntry]] = {}
        for rank in range(len(self._checkpoint.manifest.archives)):
            for key, entry in read_directory(self._checkpoint.archive(rank)).items():
                if "/padding-" not in key:
                    entries.setdefault(key, (rank, entry))
        return entries

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointStore) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str]:
        return self._checkpoint.location, self._checkpoint.manifest.attempt

    def __str__(self) -> str:
        return self._checkpoint.location

    def __repr__(self) -> str:
        return f"CheckpointStore({str(self)!r})"

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        if key not in self._entries:
            return None
        rank, entry = self._entries[key]
        start, stop = _bounds(byte_range, entry.nbytes)
        return read_entry(self._checkpoint.archive(rank), key, entry, start, stop)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a key's bytes or a range of them, verified; None where there is no such key."""
        if not self._is_open:
            await self._open()
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return several ranges, in the order of the requests."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Return whether there is such a key."""
        return key in self._entries

    async def getsize(self, key: str) -> int:
        """Return a key's bytes; raises `FileNotFoundError` where there is no such key."""
        if key not in self._entries:
            raise FileNotFoundError(key)
        return self._entries[key][1].nbytes

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse: a checkpoint is never changed."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Refuse: a checkpoint is never changed."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        for key in self._entries:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield all keys that begin with a prefix."""
        for key in self._entries:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names right below a prefix, each once."""
        base = prefix.rstrip("/")
        base = f"{base}/" if base else ""
        for name in dict.fromkeys(key[len(base) :].split("/")[0] for key in self._entries if key.startswith(base)):
            yield name


def _bounds(byte_range: ByteRequest | None, nbytes: int) -> tuple[int, int]:
    match byte_range:
        case None:
            return 0, nbytes
        case RangeByteRequest(start, end):
            return min(start, nbytes), min(end, nbytes)
        case OffsetByteRequest(offset):
            return min(offset, nbytes), nbytes
        case SuffixByteRequest(suffix):
            return max(0, nbytes - suffix), nbytes
    raise TypeError(f"{byte_range!r} is no byte range that zarr knows")


def tensorstore_spec(path: str | os.PathLike[str], node: str) -> dict[str, Any]:
    """Return a TensorStore spec that opens one array of a checkpoint over all of its archives.

    `node` is the array's place in the hierarchy, `state/model/weight`. The spec stacks the archives (driver
    `kvstack`) with one exact key range for each chunk: a layer without a range would hide all those below it.
    TensorStore reads without our checksums.

    Raises `CheckpointNotFoundError`, and `KeyError` where there is no such array.
    """
    store = CheckpointStore.at(path)
    keys = sorted(key for key in store._entries if key == f"{node}/zarr.json" or key.startswith(f"{node}/c"))
    if f"{node}/zarr.json" not in keys:
        raise KeyError(f"{store}: there is no array {node!r}")
    layers = []
    for key in keys:
        rank, _ = store._entries[key]
        file = store._checkpoint.archive(rank).location
        layers.append(
            {
                "base": {"driver": "zip", "base": f"file://{os.path.abspath(file)}", "path": key},
                "exact": key,
                "strip_prefix": len(key),
            }
        )
    return {"driver": "zarr3", "kvstore": {"driver": "kvstack", "layers": layers, "path": f"{node}/"}}
