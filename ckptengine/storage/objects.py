"""The few verbs of an object store that a storage is made of."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Listing", "Objects", "Stat", "Unfinished", "Upload"]


@dataclass(frozen=True, slots=True)
class Stat:
    """An object's size in bytes, and when it was written by the store's clock, in seconds since 1970."""

    nbytes: int
    modified: float


@dataclass(frozen=True, slots=True)
class Listing:
    """Names right below a prefix: of objects, and of prefixes with objects below them."""

    objects: tuple[str, ...]
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An upload that was begun: its key, the store's id, and when, in seconds since 1970."""

    key: str
    upload: str
    began: float


class Upload(ABC):
    """A large object on its way, in parts that are numbered from 1 on."""

    in_order = False
    """Whether parts must be sent one after the other, and can't be sent twice."""

    @abstractmethod
    def send(self, number: int, memory: memoryview, seconds: float) -> None:
        """Send a part; the memory is not looked at any more when this returns or raises."""

    @abstractmethod
    def complete(self, seconds: float) -> None:
        """Make the object, of all parts."""

    @abstractmethod
    def abort(self, seconds: float) -> None:
        """Give up, and free what the store holds of it."""


class Objects(ABC):
    """Objects under keys, which are relative to the storage's root. Safe to use from several threads.

    Every method makes one try, of at most `seconds`, and raises whatever the library underneath does;
    `ckptengine.storage.retry` tells what that means.
    """

    atomic_create = False
    """Whether `create` is decided by the store, as far as is known; a probe may know better."""
    needs_probe = False
    """Whether it depends on the store behind the protocol."""
    parts_in_parallel = False
    """Whether the parts of an upload may be sent at the same time."""
    least_part_nbytes = 1
    most_part_nbytes = 1 << 62
    most_parts = 1 << 62
    most_deleted = 1 << 62
    """How many keys `delete` takes at once."""

    version = 0
    """How often the store was connected anew."""
    told = 0
    """Up to which version that was told."""
    outage = -float("inf")
    """When an operation was last given up because the store did not answer, by `time.monotonic`."""

    def __init__(self) -> None:
        self._renewing = threading.Lock()

    @property
    def endpoint(self) -> str:
        """Where the store is asked, without credentials; empty where the location says it."""
        return ""

    def renew(self, seen: int) -> bool:
        """Connect anew with the credentials that are there now, unless that was done since version `seen`.

        Returns whether a refused request may have another answer then.
        """
        return False

    def reconnect(self, seen: int) -> None:  # noqa: B027
        """Let go of a connection that was lost, where that does not go by itself."""

    @abstractmethod
    def put(self, key: str, data: Buffer, seconds: float) -> None:
        """Write an object, replacing one of that key."""

    @abstractmethod
    def create(self, key: str, data: bytes, seconds: float) -> None:
        """Write an object unless there is one of that key; fails as `Kind.TAKEN` where there is."""

    @abstractmethod
    def get(self, key: str, position: int, nbytes: int, seconds: float) -> bytes | memoryview:
        """Return bytes of an object, fewer only where it ends before."""

    @abstractmethod
    def stat(self, key: str, seconds: float) -> Stat:
        """Return size and time of an object."""

    @abstractmethod
    def list(self, prefix: str, seconds: float) -> Listing:
        """Return what lies right below a prefix, which is empty or ends with a slash."""

    @abstractmethod
    def below(self, prefix: str, seconds: float) -> dict[str, Stat]:
        """Return all objects below a prefix, which is empty or ends with a slash."""

    @abstractmethod
    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """Delete objects; those that are missing are no error."""

    def remove_empty(self, prefix: str, seconds: float) -> None:  # noqa: B027
        """Remove a directory and those below it, as far as they are empty, where the store has directories at all."""

    @abstractmethod
    def upload(self, key: str, part_nbytes: int, seconds: float) -> Upload:
        """Begin to write a large object."""

    @abstractmethod
    def unfinished(self, prefix: str, seconds: float) -> tuple[Unfinished, ...]:
        """Return the uploads below a prefix that were begun and are not complete."""

    @abstractmethod
    def abort(self, unfinished: Unfinished, seconds: float) -> None:
        """Give up an upload, also another process's."""

    @abstractmethod
    def now(self, seconds: float) -> float | None:
        """Return the store's time, None where only a newly written object tells."""
