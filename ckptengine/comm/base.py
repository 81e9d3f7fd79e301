"""The two interfaces through which ranks coordinate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

__all__ = ["Communicator", "KeyValueStore"]


class KeyValueStore(ABC):
    """Small values under string keys that all ranks see. Safe to use from a background thread."""

    blocks: bool = False
    """Whether `get` waits without looking again and again, so that a thread may wait for hours at no cost."""

    @abstractmethod
    def set(self, key: str, value: bytes) -> None:
        """Store a value; it must be visible to a `get` that starts afterwards on any rank."""

    @abstractmethod
    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""

    @abstractmethod
    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one, and return the one that it has then; the store decides between callers.

        The value is ASCII text that no other caller gives (put an id in it).
        """

    # Of many keys at once: a store that is far away is asked once, not once for each.

    def set_each(self, values: Mapping[str, bytes]) -> None:
        """Store several values."""
        for key, value in values.items():
            self.set(key, value)

    def get_each(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of several keys, None for each that is not there now."""
        return [self.get(key, 0.0) for key in keys]

    def delete_each(self, keys: Sequence[str]) -> None:
        """Remove several keys."""
        for key in keys:
            self.delete(key)


class Communicator(ABC):
    """One group of ranks. Every operation is entered by all ranks in the same order, from the main thread.

    Each takes a `timeout` in seconds and raises `DeadlineError` naming the ranks that did not come.
    """

    rank: int
    world_size: int
    about: str = ""
    """What the operations to come are for, in the same words on all ranks, or nothing: by it a rank that left one out
    is told from one that is late, for which the others have waited in vain."""

    @abstractmethod
    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        """Return every rank's value, in the order of the ranks."""

    @abstractmethod
    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        """Return the root's value on all ranks; the others pass None."""

    @abstractmethod
    def barrier(self, timeout: float) -> None:
        """Return when all ranks have come."""

    def awaited(self) -> bool:
        """Return, without waiting, whether rank 0 is in an operation to which this rank has yet to come."""
        return False

    @abstractmethod
    def store(self) -> KeyValueStore | None:
        """Return the store for background messages, or None: then they go through the checkpoint's storage."""
