"""What the engine has done in this process, counted: unlike timings, the same on any machine."""

from __future__ import annotations

from dataclasses import astuple, dataclass

__all__ = ["Counters", "counters", "note_file", "note_sync"]


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes copied between tensors and images or read buffers; bytes and calls of reads and writes of archives; files
    created, and syncs of files and directories.
    """

    copied_nbytes: int
    written_nbytes: int
    write_calls: int
    read_nbytes: int
    read_calls: int
    files: int
    syncs: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


_files = _syncs = 0


def note_file() -> None:
    """Count a file that was created."""
    global _files
    _files += 1


def note_sync() -> None:
    """Count a sync of a file or directory."""
    global _syncs
    _syncs += 1


def counters() -> Counters:
    """Return the totals since the process began; subtract two to see what lies between them."""
    import ckptengine._native as _native

    return Counters(*_native.counters(), _files, _syncs)
