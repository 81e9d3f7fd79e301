"""A group of one."""

from __future__ import annotations

from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.comm.keyvalue import MemoryStore

__all__ = ["ALONE", "SingleProcess"]


class SingleProcess(Communicator):
    """Communicator of a process that saves and loads by itself: as `comm=` it coordinates with no other rank."""

    def __init__(self) -> None:
        self.rank = 0
        self.world_size = 1
        self._store = MemoryStore()

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        """Return the own value."""
        return [value]

    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        """Return the own value."""
        if root != 0 or value is None:
            raise ValueError(f"broadcast from rank {root} of {value!r}: a single process has rank 0 and a value")
        return value

    def barrier(self, timeout: float) -> None:
        """Return at once."""

    def store(self) -> KeyValueStore:
        """Return a store of this process."""
        return self._store


ALONE = SingleProcess()
"""The one of the process: plans and memory are kept by communicator, so it stays the same for the process's life."""
