"""How much the transfers of a storage may have in flight."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Budget"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What transfers of one storage may take.

    `part_nbytes` are those of one part of an upload, None: 64 MiB for archives from 512 MiB on, 16 MiB for smaller ones
    so that several parts are in flight, less where too little is written at once for that, more where the store's
    number of parts would not suffice. `requests` are in flight at most; a read asks for `read_nbytes` at once, and
    reads gaps of up to `gap_nbytes` along.
    """

    part_nbytes: int | None = None
    requests: int = 8
    read_nbytes: int = 8 << 20
    gap_nbytes: int = 256 << 10
