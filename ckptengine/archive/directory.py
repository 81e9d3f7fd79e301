"""The central directory of an archive: which entry starts where."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ckptengine.archive import zip as zipfmt
from ckptengine.archive.reader import Archive
from ckptengine.errors import CheckpointDamagedError

__all__ = ["DirectoryEntry", "entry_position", "read_directory", "read_entry"]


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One entry: where its local header starts in the file, and the bytes of its data."""

    header_position: int
    nbytes: int


def read_directory(archive: Archive) -> dict[str, DirectoryEntry]:
    """Return the entries of an archive by name, from its verified tail.

    Raises `CheckpointDamagedError` where the directory leads out of the file.
    """
    tail, base, where = archive.tail_bytes, archive.fixed_nbytes, archive.location
    try:
        count, nbytes, position = zipfmt.parse_end(tail)
        start = position - base
        if not 0 <= start <= start + nbytes <= len(tail):
            raise ValueError("it does not lie in the tail")
        entries = {}
        for name, size, header in zipfmt.parse_directory(tail[start : start + nbytes], count):
            if not 0 <= header <= header + size <= base + len(tail):
                raise ValueError(f"entry {name!r} does not lie in the file")
            entries[name] = DirectoryEntry(header, size)
    except (ValueError, struct.error) as error:
        raise CheckpointDamagedError(f"{where}: the central directory is unreadable: {error}") from None
    return entries


def read_entry(archive: Archive, name: str, entry: DirectoryEntry, start: int, stop: int) -> bytes:
    """Return bytes `[start, stop)` of an entry's data, verified.

    Raises `CheckpointDamagedError` naming the file where they are not what was written.
    """
    if entry.header_position >= archive.fixed_nbytes:
        data = archive.tail.get(name, b"")
        if len(data) != entry.nbytes:
            raise CheckpointDamagedError(f"{archive.location}: the tail has no entry {name!r} as its directory tells")
        return data[start:stop]
    return archive.read(entry_position(archive, name, entry) + start, stop - start)


def entry_position(archive: Archive, name: str, entry: DirectoryEntry) -> int:
    """Return where the data of an entry of the fixed region starts in the file, by its header, verified.

    Raises `CheckpointDamagedError` naming the file where there is no such header.
    """
    space = zipfmt.max_header_nbytes(name)
    head = archive.read(entry.header_position, min(space, archive.fixed_nbytes - entry.header_position))
    header = zipfmt.parse_local_header(head, 0, archive.location, partial=True)
    if header is None or header.name != name or header.nbytes != entry.nbytes:
        raise CheckpointDamagedError(
            f"{archive.location}: the header at byte {entry.header_position} is not that of entry {name!r}"
        )
    return entry.header_position + header.data_position
