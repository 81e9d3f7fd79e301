"""A read-only Zarr store over all archives of one checkpoint."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
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
from ckptengine.catalog.manifest import Manifest
from ckptengine.catalog.naming import open_checkpoint
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.load.choose import newest_checkpoint
from ckptengine.storage.open import open_storage
from ckptengine.zarr.dimensions import DimensionNames, Names, chosen_names, named

__all__ = ["CheckpointStore", "StoreIndex"]


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """Which rank's archive holds each key, and the names right below each prefix (without a slash at the end)."""

    entries: dict[str, tuple[int, DirectoryEntry]]
    children: dict[str, dict[str, None]]


class CheckpointStore(Store):
    """The archives of a checkpoint as one Zarr v3 store.

    `checkpoint` names a checkpoint as in `ckptengine.load`: a run, of which the newest at that moment is taken, or its
    checkpoint of `step`; RUN/step-40 or another directory; or it is a checkpoint that has been chosen already. The
    directories of the archives are read at the first access, chunks when they are asked for; what is read is verified
    block by block. Copies in other processes (pickled) read
    the same checkpoint. Safe to use from several threads.

    `dimension_names` puts names into the metadata of the arrays, as `ckptengine.zarr.open` says; the checkpoint stays
    as it is.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError` (reading does, too), `FormatVersionError`, `ValueError`
    for `read_only=False`, and where `dimension_names` do not fit: `KeyError`, `ValueError`, `TypeError`.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(
        self,
        checkpoint: Checkpoint | str | os.PathLike[str],
        *,
        step: int | None = None,
        read_only: bool = True,
        dimension_names: DimensionNames | None = None,
    ) -> None:
        if not read_only:
            raise ValueError("a checkpoint is never changed in place: open it with read_only=True and save a new one")
        super().__init__(read_only=True)
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = newest_checkpoint(open_checkpoint(checkpoint, step=step))
        self.checkpoint = checkpoint
        self._index: StoreIndex | None = None
        self._lock = threading.Lock()
        self._names: Names | None = chosen_names(dimension_names)
        for node in self._names or ():
            document = self._document(f"{node}/zarr.json")  # raises where the number of names is another
            if document is None or b'"dimension_names"' not in document:
                raise KeyError(
                    f"dimension_names: {self} has no array {node!r}: it lies below `state`, with escaped keys "
                    "(docs/format.md), and a leaf of fragments is a group of arrays"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointStore) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[Any, ...]:
        names = None if self._names is None else tuple(sorted(self._names.items()))
        return self.checkpoint.location, self.checkpoint.manifest.attempt, names

    def __str__(self) -> str:
        return self.checkpoint.location

    def __repr__(self) -> str:
        return f"CheckpointStore({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        chosen = self.checkpoint
        return _restored, (chosen.storage.location(), chosen.directory, chosen.manifest.encode(), self._names)

    def with_read_only(self, read_only: bool = False) -> CheckpointStore:
        """Return a store of the same checkpoint; raises `NotImplementedError` for one that can be written to."""
        if not read_only:
            super().with_read_only(read_only)
        return CheckpointStore(self.checkpoint, dimension_names=self._names)

    def index(self) -> StoreIndex:
        """Return the index of all keys; the first call reads the archives' directories."""
        with self._lock:
            if self._index is None:
                self._index = _index_of(self.checkpoint)
            return self._index

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Return a key's bytes or a range of them, verified; None where there is no such key."""
        entries = self.index().entries
        if key not in entries:
            return None
        rank, entry = entries[key]
        if self._is_changed(key):
            whole = self._document(key) or b""
            start, stop = _bounds(byte_range, len(whole))
            data = whole[start:stop]
        else:
            start, stop = _bounds(byte_range, entry.nbytes)
            data = read_entry(self.checkpoint.archive(rank), key, entry, start, stop)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a key's bytes or a range of them, verified; None where there is no such key."""
        await self._ensure_open()
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return several ranges, in the order of the requests."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Return whether there is such a key."""
        return key in (await self._indexed()).entries

    async def getsize(self, key: str) -> int:
        """Return a key's bytes; raises `FileNotFoundError` where there is no such key."""
        entries = (await self._indexed()).entries
        if key not in entries:
            raise FileNotFoundError(key)
        return await asyncio.to_thread(self._nbytes, key)

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the bytes of all keys below a node: those of `a/b/…` for `a/b`, not those of `a/bc/…`."""
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        entries = (await self._indexed()).entries
        keys = [key for key in entries if key.startswith(below)]
        return await asyncio.to_thread(lambda: sum(map(self._nbytes, keys)))

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse with `ValueError`: a checkpoint is never changed."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Refuse with `ValueError`: a checkpoint is never changed."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        for key in (await self._indexed()).entries:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield all keys that begin with a prefix."""
        for key in (await self._indexed()).entries:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names right below a prefix, each once."""
        for name in (await self._indexed()).children.get(prefix.rstrip("/"), ()):
            yield name

    def _is_changed(self, key: str) -> bool:
        return self._names is not None and key.endswith("/zarr.json")

    def _document(self, key: str) -> bytes | None:
        """Return a node's metadata, with the names of its dimensions; None where there is none."""
        entries = self.index().entries
        if key not in entries:
            return None
        rank, entry = entries[key]
        stored = bytes(read_entry(self.checkpoint.archive(rank), key, entry, 0, entry.nbytes))
        return named(stored, key.removesuffix("/zarr.json"), self._names or {})

    def _nbytes(self, key: str) -> int:
        if self._is_changed(key):
            return len(self._document(key) or b"")
        return self.index().entries[key][1].nbytes

    async def _indexed(self) -> StoreIndex:
        await self._ensure_open()
        index = self._index
        return index if index is not None else await asyncio.to_thread(self.index)


def _restored(location: str, directory: str, manifest: bytes, names: Names | None) -> CheckpointStore:
    """Return the store of a checkpoint that another process has chosen."""
    storage = open_storage(location)
    chosen = Checkpoint(storage, directory, Manifest.decode(manifest, storage.location(directory)))
    return CheckpointStore(chosen, dimension_names=names)


def _index_of(checkpoint: Checkpoint) -> StoreIndex:
    entries: dict[str, tuple[int, DirectoryEntry]] = {}
    children: dict[str, dict[str, None]] = {}
    for rank in range(checkpoint.manifest.world_size):
        for key, entry in read_directory(checkpoint.archive(rank)).items():
            # Metadata that several archives hold is the same in all of them.
            if not _is_padding(key):
                entries.setdefault(key, (rank, entry))
    for key in entries:
        while key:
            above, _, name = key.rpartition("/")
            names = children.setdefault(above, {})
            if name in names:
                break
            names[name] = None
            key = above
    return StoreIndex(entries, children)


def _is_padding(key: str) -> bool:
    return key.startswith("checksums/") and key.endswith(("/padding-fixed", "/padding-tail"))


def _bounds(byte_range: ByteRequest | None, nbytes: int) -> tuple[int, int]:
    match byte_range:
        case None:
            return 0, nbytes
        case RangeByteRequest(start, end):
            return min(start, nbytes), min(max(start, end), nbytes)
        case OffsetByteRequest(offset):
            return min(offset, nbytes), nbytes
        case SuffixByteRequest(suffix):
            return max(0, nbytes - suffix), nbytes
    raise TypeError(f"Unexpected byte_range, got {byte_range!r}")
