"""The records of a ZIP file as this format uses them: STORED, ZIP64 throughout, CRCs after the data.

Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.9 (data descriptor), 4.3.12 (directory),
4.3.14 to 4.3.16 (end records), 4.5.3 (ZIP64 extra field).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ckptengine.errors import CheckpointDamagedError

__all__ = [
    "CRC_IN_DESCRIPTOR",
    "CRC_IN_DIRECTORY",
    "DESCRIPTOR_NBYTES",
    "LocalHeader",
    "descriptor",
    "directory_record",
    "end_records",
    "end_records_nbytes",
    "header_nbytes",
    "local_header",
    "max_header_nbytes",
    "parse_directory",
    "parse_end",
    "parse_local_header",
    "walk_entries",
]

_VERSION = 45  # the first version with ZIP64
_MADE_BY = (3 << 8) | _VERSION  # Unix, so that `unzip` takes the permissions below
_FLAGS = (1 << 3) | (1 << 11)  # sizes and CRC follow in a descriptor; names are UTF-8
_DATE = (1 << 5) | 1  # 1980-01-01, the earliest: headers depend on nothing but the plan
_PERMISSIONS = 0o100644 << 16
_MAX32 = 0xFFFFFFFF

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_ZIP64_LOCAL = struct.Struct("<HHQQ")
_PADDING = struct.Struct("<HHH")
_PADDING_ID = 0xD935  # the extra field that Android's zipalign uses for alignment
_DESCRIPTOR = struct.Struct("<IIQQ")
_DIRECTORY = struct.Struct("<IHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_END = struct.Struct("<IHHHHIIH")

DESCRIPTOR_NBYTES = _DESCRIPTOR.size
CRC_IN_DESCRIPTOR = 4
"""Offset of the CRC within a data descriptor."""
CRC_IN_DIRECTORY = 16
"""Offset of the CRC within a directory record."""


def header_nbytes(name: bytes) -> int:
    """Return the length of an unpadded local header in bytes."""
    return _LOCAL.size + len(name) + _ZIP64_LOCAL.size


def local_header(name: bytes, nbytes: int, padding: int = 0) -> bytes:
    """Return a local header for `nbytes` of data, lengthened by `padding` bytes (0, or 6 to 65,000)."""
    extra = _ZIP64_LOCAL.pack(1, 16, nbytes, nbytes)
    if padding:
        extra += _PADDING.pack(_PADDING_ID, padding - 4, 4096) + bytes(padding - _PADDING.size)
    fixed = _LOCAL.pack(0x04034B50, _VERSION, _FLAGS, 0, 0, _DATE, 0, _MAX32, _MAX32, len(name), len(extra))
    return fixed + name + extra


def descriptor(crc: int, nbytes: int) -> bytes:
    """Return the ZIP64 data descriptor that follows an entry's data."""
    return _DESCRIPTOR.pack(0x08074B50, crc, nbytes, nbytes)


def directory_record(name: bytes, crc: int, nbytes: int, header_position: int) -> bytes:
    """Return an entry's record in the central directory."""
    wide = [value for value in (nbytes, nbytes, header_position) if value >= _MAX32]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, position = min(nbytes, _MAX32), min(header_position, _MAX32)
    fixed = _DIRECTORY.pack(
        0x02014B50, _MADE_BY, _VERSION, _FLAGS, 0, 0, _DATE, crc, size, size,
        len(name), len(extra), 0, 0, 0, _PERMISSIONS, position,
    )  # fmt: skip
    return fixed + name + extra


def end_records(count: int, directory_position: int, directory_nbytes: int) -> bytes:
    """Return the records that close the file: the ZIP64 end, its locator, and the classic end."""
    end64_position = directory_position + directory_nbytes
    return (
        _END64.pack(
            0x06064B50, _END64.size - 12, _MADE_BY, _VERSION, 0, 0, count, count,
            directory_nbytes, directory_position,
        )
        + _LOCATOR.pack(0x07064B50, 0, end64_position, 1)
        + _END.pack(
            0x06054B50, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
            min(directory_nbytes, _MAX32), min(directory_position, _MAX32), 0,
        )
    )  # fmt: skip


end_records_nbytes = _END64.size + _LOCATOR.size + _END.size


@dataclass(frozen=True, slots=True)
class LocalHeader:
    """What a local header says: the entry's name, where its data starts (in the buffer) and its length."""

    name: str
    data_position: int
    nbytes: int


def max_header_nbytes(name: str) -> int:
    """Return how long the local header of an entry can be: the alignment adds less than 4096 + 6 bytes."""
    return header_nbytes(name.encode()) + 4096 + 6


def parse_local_header(data: bytes, position: int, where: str, partial: bool = False) -> LocalHeader | None:
    """Return the local header at a position of a buffer, None where none starts there.

    Raises `CheckpointDamagedError`, naming `where`, for a header that this format does not write or, unless the
    buffer is said to be `partial`, one that leads out of it.
    """
    if data[position : position + 4] != b"PK\x03\x04":
        return None
    try:
        fields = _LOCAL.unpack_from(data, position)
        name_nbytes, extra_nbytes = fields[9], fields[10]
        start = position + _LOCAL.size
        name = bytes(data[start : start + name_nbytes]).decode()
        tag, length, nbytes, stored = _ZIP64_LOCAL.unpack_from(data, start + name_nbytes)
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointDamagedError(f"{where}: unreadable entry header at byte {position}: {error}") from None
    data_position = start + name_nbytes + extra_nbytes
    if fields[2] != _FLAGS or fields[3] != 0 or (tag, length) != (1, 16) or nbytes != stored:
        raise CheckpointDamagedError(f"{where}: the entry header at byte {position} is not one of this format")
    if not partial and data_position + nbytes + DESCRIPTOR_NBYTES > len(data):
        raise CheckpointDamagedError(f"{where}: entry {name!r} of {nbytes} bytes leads out of the file")
    return LocalHeader(name, data_position, nbytes)


def walk_entries(data: bytes, where: str) -> dict[str, bytes]:
    """Return the entries that follow each other from the start of a buffer on, by name.

    `where` names the file in errors. Raises `CheckpointDamagedError` where a header leads out of the buffer.
    """
    entries: dict[str, bytes] = {}
    position = 0
    while header := parse_local_header(data, position, where):
        end = header.data_position + header.nbytes
        entries[header.name] = data[header.data_position : end]
        position = end + DESCRIPTOR_NBYTES
    return entries


def parse_end(data: bytes) -> tuple[int, int, int]:
    """Return number of entries, bytes and position of the central directory, given the end of a file.

    Raises `ValueError` where the end records are not those of this format.
    """
    start = len(data) - end_records_nbytes
    if start < 0 or data[start : start + 4] != b"PK\x06\x06":
        raise ValueError("there is no ZIP64 end record")
    fields = _END64.unpack_from(data, start)
    return fields[7], fields[8], fields[9]


def parse_directory(data: bytes, count: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, bytes and position of the local header of each entry of a central directory.

    Raises `ValueError` or `struct.error` where the records don't fit the bytes.
    """
    position = 0
    for _ in range(count):
        fields = _DIRECTORY.unpack_from(data, position)
        if fields[0] != 0x02014B50:
            raise ValueError(f"there is no record at byte {position}")
        size, name_nbytes, extra_nbytes, comment_nbytes, header = *fields[9:13], fields[16]
        position += _DIRECTORY.size
        name = data[position : position + name_nbytes].decode()
        position += name_nbytes
        extra = data[position + 4 : position + extra_nbytes]
        wide = iter(struct.unpack(f"<{len(extra) // 8}Q", extra))
        if size == _MAX32:
            size = next(wide, 0)
            next(wide, 0)
        if header == _MAX32:
            header = next(wide, 0)
        position += extra_nbytes + comment_nbytes
        yield name, size, header
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes follow the last record")
