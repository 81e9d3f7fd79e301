"""A ZIP of stored entries that is written front to back: checksums follow the data that they are of."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import ckptengine._native as _native
from ckptengine.archive import zip as zipfmt
from ckptengine.export.contents import Item
from ckptengine.export.stream import FilePlan, Late, Segment

__all__ = ["plan_zip", "zip_segments"]

_LEAST_PADDING = 6


def plan_zip(name: str, entries: Sequence[tuple[str, list[bytes | Item]]]) -> FilePlan:
    """Return the plan of a ZIP file; each entry is made of bytes and arrays."""
    return FilePlan(name, tuple(zip_segments(entries, 0)), sums=True)


def zip_segments(entries: Sequence[tuple[str, list[bytes | Item]]], first: int, alignment: int = 1) -> list[Segment]:
    """Return the segments of a ZIP, in which all positions are counted from its own start.

    `first` is the place of its first segment among those of the file. The data of each entry starts at a multiple of
    `alignment`.
    """
    segments: list[Segment] = []
    known: list[tuple[bytes, list[tuple[bytes | int, int]], int, int]] = []  # name, parts, bytes, position
    at = 0
    for name, content in entries:
        raw = name.encode()
        nbytes = sum(len(one) if isinstance(one, bytes) else one.nbytes for one in content)
        padding = -(at + zipfmt.header_nbytes(raw)) % alignment
        while 0 < padding < _LEAST_PADDING:
            padding += alignment
        local = zipfmt.local_header(raw, nbytes, padding)
        segments.append(local)
        parts: list[tuple[bytes | int, int]] = []
        for one in content:
            size = len(one) if isinstance(one, bytes) else one.nbytes
            parts.append((one if isinstance(one, bytes) else first + len(segments), size))
            segments.append(one)
        segments.append(Late(zipfmt.DESCRIPTOR_NBYTES, functools.partial(_descriptor, parts, nbytes)))
        known.append((raw, parts, nbytes, at))
        at += len(local) + nbytes + zipfmt.DESCRIPTOR_NBYTES

    def close(sums: dict[int, int]) -> bytes:
        records = b"".join(
            zipfmt.directory_record(name, _crc32(parts, sums), nbytes, header) for name, parts, nbytes, header in known
        )
        return records + zipfmt.end_records(len(known), at, len(records))

    segments.append(Late(len(close({})), close))
    return segments


def _descriptor(parts: Sequence[tuple[bytes | int, int]], nbytes: int, sums: dict[int, int]) -> bytes:
    return zipfmt.descriptor(_crc32(parts, sums), nbytes)


def _crc32(parts: Sequence[tuple[bytes | int, int]], sums: dict[int, int]) -> int:
    """Return the CRC32 of parts one after the other: bytes, or arrays by their place in `sums`."""
    crc = 0
    for part, nbytes in parts:
        if isinstance(part, bytes):
            crc = _native.crc32(part, crc)
        else:
            crc = _native.crc32_combine(crc, sums.get(part, 0), nbytes)
    return crc
