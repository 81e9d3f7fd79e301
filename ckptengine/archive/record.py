"""What a manifest says of one archive."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ArchiveRecord"]


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """An archive's file name, its size in bytes, where its tail starts, and the tail's SHA-256 in hex."""

    name: str
    nbytes: int
    tail_position: int
    tail_sha256: str
