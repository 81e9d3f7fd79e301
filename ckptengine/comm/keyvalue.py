"""Key-value stores of our own, and values that are too large for one key."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ckptengine.comm.base import KeyValueStore
from ckptengine.errors import CheckpointError

__all__ = [
    "PART_NBYTES",
    "MemoryStore",
    "delete_large",
    "delete_large_each",
    "get_large",
    "get_large_each",
    "poll",
    "put_large",
    "put_large_each",
]

PART_NBYTES = 1 << 20
"""Bytes of a large value under one key; torch's TCPStore closes the connection at values above 8 MiB."""
LARGEST_NBYTES = 1 << 40
"""A length above this is taken for damage."""

_LONGEST_PAUSE = 0.05
_HEAD = struct.Struct("<QQ")


def poll(look: Callable[[], bytes | None], timeout: float) -> bytes | None:
    """Look at least once, then again after pauses of 1 to 50 ms, until there is a value or time is up."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while (value := look()) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
    return value


class MemoryStore(KeyValueStore):
    """A store for the threads of one process."""

    blocks = True

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition(threading.RLock())

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        with self._changed:
            self._values[key] = bytes(value)
            self._changed.notify_all()

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, max(0.0, timeout))
            return self._values.get(key)

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        with self._changed:
            self._values.pop(key, None)

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one; return the one that it has."""
        with self._changed:
            if key not in self._values:
                self.set(key, value)
            return self._values[key]


def put_large(store: KeyValueStore, key: str, value: bytes) -> None:
    """Store a value of any size: above 1 MiB as parts under keys of their own, the head last."""
    if len(value) < PART_NBYTES:
        store.set(key, b"=" + value)
        return
    count = -(-len(value) // PART_NBYTES)
    for number in range(count):
        store.set(f"{key}/{number}", value[number * PART_NBYTES : (number + 1) * PART_NBYTES])
    store.set(key, b"#" + _HEAD.pack(count, len(value)))


def put_large_each(store: KeyValueStore, values: Mapping[str, bytes]) -> None:
    """Store several values of any size."""
    store.set_each({key: b"=" + value for key, value in values.items() if len(value) < PART_NBYTES})
    for key, value in values.items():
        if len(value) >= PART_NBYTES:
            put_large(store, key, value)


def get_large(store: KeyValueStore, key: str, timeout: float) -> bytes | None:
    """Return what `put_large` stored, None after `timeout` seconds without it."""
    deadline = time.monotonic() + timeout
    head = store.get(key, timeout)
    if head is None:
        return None
    if head[:1] == b"=":
        return head[1:]
    parts = []
    for number in range(_parts(key, head)):
        # The parts were there before the head: whatever the deadline, one look is due.
        part = store.get(f"{key}/{number}", max(1.0, deadline - time.monotonic()))
        if part is None:
            return None
        parts.append(part)
    value = b"".join(parts)
    if len(value) != _HEAD.unpack(head[1:])[1]:
        raise CheckpointError(f"message {key!r}: {len(value)} bytes came, {_HEAD.unpack(head[1:])[1]} were sent")
    return value


def get_large_each(store: KeyValueStore, keys: Sequence[str]) -> list[bytes | None]:
    """Return of several keys what `put_large` stored, None for each that is not there now."""
    heads = zip(keys, store.get_each(keys), strict=True)
    return [head[1:] if head and head[:1] == b"=" else head and get_large(store, key, 0.0) for key, head in heads]


def delete_large(store: KeyValueStore, key: str) -> None:
    """Remove what `put_large` stored; a key that is not there is no error."""
    delete_large_each(store, [key])


def delete_large_each(store: KeyValueStore, keys: Sequence[str]) -> None:
    """Remove of several keys what `put_large` stored."""
    there = [(key, head) for key, head in zip(keys, store.get_each(keys), strict=True) if head is not None]
    store.delete_each([key for key, _ in there])
    parts = [f"{key}/{number}" for key, head in there if head[:1] == b"#" for number in range(_parts(key, head))]
    store.delete_each(parts)


def _parts(key: str, head: bytes) -> int:
    if len(head) == 1 + _HEAD.size and head[:1] == b"#":
        count, nbytes = _HEAD.unpack(head[1:])
        if nbytes <= LARGEST_NBYTES and count == -(-nbytes // PART_NBYTES):
            return int(count)
    raise CheckpointError(f"message {key!r}: its head is damaged")
