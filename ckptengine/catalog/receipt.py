"""Receipts: what each rank tells rank 0 of its part of a save, and the channel on which they travel."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ckptengine.archive.record import ArchiveRecord
from ckptengine.comm.base import KeyValueStore
from ckptengine.comm.keyvalue import delete_large_each, get_large, get_large_each, poll, put_large, put_large_each
from ckptengine.errors import CheckpointError, DeadlineError, SaveFailedError, StorageError
from ckptengine.schema.ranks import name_ranks
from ckptengine.storage.base import Storage, join

__all__ = ["Channel", "Outcome", "Receipt", "StorageStore", "collect", "patience"]

_T = TypeVar("_T")
_MAX_FILE_NBYTES = 1 << 30
_GRACE = 15.0
"""Seconds that the other ranks wait longer than rank 0, so that they hear from it who is missing."""


def patience(rank: int) -> float:
    """Return the seconds beyond a save's deadline that a rank waits for the word of rank 0; rank 0 itself: none."""
    return 0.0 if rank == 0 else _GRACE


@dataclass(frozen=True, slots=True)
class Receipt:
    """One rank's part of a save.

    `error` says why there is none; then `archive` is None. `value_paths` and `digests` are those of its
    replicated plain values (`ckptengine.save.values`). `stores` tells whether it stores any of these, without being
    rank 0, `fresh` which it stores though the others don't know of it, `form_digest` and `form` how its state is built
    where they don't know that either (`ckptengine.save.shares`). `replica_crcs` are those of its replicated arrays
    where they are to be compared, `rows` its encoded `RankRows` where rank 0 doesn't know them, `alone` whether the
    others don't know its plan, `directory` the checkpoint's, where this rank has written.
    """

    rank: int
    archive: ArchiveRecord | None
    error: str = ""
    value_paths: tuple[tuple[str | int, ...], ...] = ()
    digests: bytes = b""
    stores: bool = False
    fresh: tuple[int, ...] = ()
    form_digest: str = ""
    form: bytes = b""
    replica_crcs: tuple[tuple[tuple[str | int, ...], int], ...] = ()
    rows: bytes = b""
    alone: bool = False
    directory: str = ""

    def encode(self) -> bytes:
        """Return the receipt as it travels."""
        record = self.archive
        return json.dumps(
            {
                "rank": self.rank,
                "archive": None
                if record is None
                else [record.name, record.nbytes, record.tail_position, record.tail_sha256],
                "error": self.error,
                "value_paths": self.value_paths,
                "digests": base64.b64encode(self.digests).decode(),
                "stores": self.stores,
                "fresh": self.fresh,
                "form_digest": self.form_digest,
                "form": base64.b64encode(self.form).decode(),
                "replica_crcs": self.replica_crcs,
                "rows": base64.b64encode(self.rows).decode(),
                "alone": self.alone,
                "directory": self.directory,
            }
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> Receipt:
        """Return the receipt of a message; raises `SaveFailedError` where it is damaged."""
        try:
            document = json.loads(data)
            record = document["archive"]
            return cls(
                rank=_of(int, document["rank"]),
                archive=None if record is None else _record(record),
                error=_of(str, document["error"]),
                value_paths=tuple(map(_path, document["value_paths"])),
                digests=base64.b64decode(document["digests"], validate=True),
                stores=_of(bool, document["stores"]),
                fresh=tuple(_of(int, number) for number in document["fresh"]),
                form_digest=_of(str, document["form_digest"]),
                form=base64.b64decode(document["form"], validate=True),
                replica_crcs=tuple((_path(path), _of(int, crc)) for path, crc in document["replica_crcs"]),
                rows=base64.b64decode(document["rows"], validate=True),
                alone=_of(bool, document["alone"]),
                directory=_of(str, document["directory"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise SaveFailedError(f"a rank's receipt is damaged ({error}); the save was not committed") from None


def _of(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise ValueError(f"{kind.__name__} was expected, {value!r:.80} found")
    return value


def _path(value: Any) -> tuple[str | int, ...]:
    if any(type(key) not in (str, int) for key in _of(list, value)):
        raise ValueError(f"a path was expected, {value!r:.80} found")
    return tuple(value)


def _record(value: Any) -> ArchiveRecord:
    name, nbytes, tail_position, digest = value
    return ArchiveRecord(_of(str, name), _of(int, nbytes), _of(int, tail_position), _of(str, digest))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, as rank 0 tells the others: committed where `error` is empty.

    `kind` names the error's class in `ckptengine.errors`, `directory` is the checkpoint's where rank 0 has written.
    """

    error: str = ""
    plan_together: bool = False
    kind: str = ""
    directory: str = ""

    def encode(self) -> bytes:
        """Return the outcome as it travels."""
        return json.dumps([self.error, self.plan_together, self.kind, self.directory]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Outcome:
        """Return the outcome of a message; raises `SaveFailedError` where it is damaged."""
        try:
            error, plan_together, kind, directory = json.loads(data)
            return cls(_of(str, error), _of(bool, plan_together), _of(str, kind), _of(str, directory))
        except (TypeError, ValueError, RecursionError) as problem:
            raise SaveFailedError(
                f"rank 0's word on the commit is damaged ({problem}): the storage tells whether it came"
            ) from None


class StorageStore(KeyValueStore):
    """Keys as files in an attempt's directory: for jobs that have no key-value store. `get` polls.

    Nothing is synced: these are messages, not records, and a crash ends the attempt that they belong to.
    """

    def __init__(self, storage: Storage, directory: str) -> None:
        self._storage, self._directory = storage, directory

    def _name(self, key: str) -> str:
        return join(self._directory, f"message-{key.replace('/', '-')}")

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._storage.write_bytes(self._name(key), value, durable=False)

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        return poll(lambda: self._look(self._name(key)), timeout)

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        try:
            self._storage.delete(self._name(key), durable=False)
        except StorageError as error:
            if error.errno != errno.ENOENT:  # the whole attempt has been swept
                raise

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one; return the one that it has."""
        name = self._name(key)
        if self._storage.put_if_absent(name, value):
            return value
        standing = self.get(key, _GRACE)
        if standing is None:
            raise DeadlineError(f"the message {name} is there and can't be read")
        return standing

    def _look(self, name: str) -> bytes | None:
        if self._storage.size(name) is None:
            return None
        try:
            return self._storage.read_bytes(name, _MAX_FILE_NBYTES)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return None  # whom it was for has just taken it


class Channel:
    """The messages of one attempt: a receipt from each rank to rank 0, an outcome back.

    Keys carry the attempt. Rank 0 deletes the receipts that it has, each rank its own copy of the outcome.
    """

    def __init__(self, store: KeyValueStore, attempt: str, rank: int, world_size: int) -> None:
        self._store = store
        self._prefix = f"ckptengine/save/{attempt}"
        self.rank, self.world_size = rank, world_size
        self._came: set[int] = {rank}

    def enter(self, directory: str) -> None:
        """Say where this attempt goes; all ranks say the same, before their receipts."""
        self._store.set(f"{self._prefix}/place", directory.encode())

    def place(self) -> str | None:
        """Return where the ranks that are in this attempt, or were, have it go; None where none is."""
        data = self._store.get(f"{self._prefix}/place", 0.0)
        return None if data is None else data.decode()

    def leave(self) -> None:
        """Forget where the attempt went: no rank will ask any more."""
        self._forget(f"{self._prefix}/place")

    def send(self, receipt: Receipt) -> None:
        """Send this rank's receipt."""
        put_large(self._store, f"{self._prefix}/receipt/{self.rank}", receipt.encode())

    def receive(self, rank: int, timeout: float) -> Receipt | None:
        """Return a rank's receipt, None after `timeout` seconds without it."""
        key = f"{self._prefix}/receipt/{rank}"
        data = get_large(self._store, key, timeout)
        if data is None:
            return None
        self._came.add(rank)
        self._forget(key)
        return Receipt.decode(data)

    def receive_all(self, ranks: Sequence[int]) -> dict[int, Receipt]:
        """Return those receipts of some ranks that are there."""
        keys = {rank: f"{self._prefix}/receipt/{rank}" for rank in ranks}
        found = zip(ranks, get_large_each(self._store, list(keys.values())), strict=True)
        came = {rank: data for rank, data in found if data is not None}
        self._came.update(came)
        self._forget(*(keys[rank] for rank in came))
        return {rank: Receipt.decode(data) for rank, data in came.items()}

    def drain(self, deadline: float) -> bool:
        """Take the receipts of a failed attempt that have yet to come; return whether all came in time.

        Then no rank writes for this attempt any more.
        """
        for rank in range(self.world_size):
            if rank not in self._came and self.receive(rank, max(0.0, deadline - time.monotonic())) is None:
                return False
        return True

    def announce(self, outcome: Outcome, ranks: Iterable[int] | None = None) -> dict[int, CheckpointError]:
        """Tell the other ranks, or `ranks`, how the attempt ended; return those that could not be told, and why."""
        untold: dict[int, CheckpointError] = {}
        told = range(1, self.world_size) if ranks is None else ranks
        keys, word = {rank: f"{self._prefix}/outcome/{rank}" for rank in told}, outcome.encode()
        with contextlib.suppress(CheckpointError):  # else each by itself
            put_large_each(self._store, dict.fromkeys(keys.values(), word))
            return {}
        for rank, key in keys.items():
            try:
                put_large(self._store, key, word)
            except CheckpointError as error:
                untold[rank] = error
        return untold

    def hand_out(self, manifest: bytes, ranks: Iterable[int]) -> None:
        """Give the manifest that was published to the ranks whose nodes get a copy; before the outcome."""
        for rank in ranks:
            put_large(self._store, f"{self._prefix}/manifest/{rank}", manifest)

    def handed(self) -> bytes | None:
        """Return the manifest that was handed to this rank before the outcome, None where there is none."""
        key = f"{self._prefix}/manifest/{self.rank}"
        data = get_large(self._store, key, 0.0)
        if data is not None:
            self._forget(key)
        return data

    def heard(self, deadline: float) -> bool:
        """Wait until all other ranks have taken the outcome; return whether they had by the deadline."""
        for rank in range(1, self.world_size):
            key = f"{self._prefix}/outcome/{rank}"
            taken = poll(
                lambda key=key: b"" if self._store.get(key, 0.0) is None else None,  # type: ignore[misc]
                max(0.0, deadline - time.monotonic()),
            )
            if taken is None:
                return False
        return True

    def outcome(self, deadline: float) -> Outcome:
        """Wait for rank 0's word until a moment of `time.monotonic`; raises `DeadlineError` naming rank 0."""
        outcome = self.hear(max(0.0, deadline - time.monotonic()) + patience(self.rank))
        if outcome is None:
            raise DeadlineError("rank 0 did not report in time whether the checkpoint was committed; it may have died")
        return outcome

    def hear(self, seconds: float) -> Outcome | None:
        """Wait for rank 0's word for so many seconds; None where it does not come."""
        key = f"{self._prefix}/outcome/{self.rank}"
        data = get_large(self._store, key, seconds)
        if data is None:
            return None
        self._forget(key)
        return Outcome.decode(data)

    def _forget(self, *keys: str) -> None:
        """Delete what was read: it is known, and a key that stays does no harm, as where the store's host has ended."""
        with contextlib.suppress(CheckpointError):
            delete_large_each(self._store, keys)


def collect(channel: Channel, own: Receipt, deadline: float) -> list[Receipt]:
    """Return all ranks' receipts, in the order of the ranks; `deadline` is a moment of `time.monotonic`.

    Raises `SaveFailedError` as soon as a rank reports an error, naming all that have reported one by then,
    and `DeadlineError` naming the ranks that did not come.
    """
    receipts: dict[int, Receipt] = {own.rank: own}
    pause = 0.001
    while True:
        # All open ranks in one pass, so that the last one's error need not wait for the first one.
        began = time.monotonic()
        receipts |= channel.receive_all([rank for rank in range(channel.world_size) if rank not in receipts])
        failed = [receipt for _, receipt in sorted(receipts.items()) if receipt.error]
        if failed:
            raise SaveFailedError("; ".join(f"rank {receipt.rank}: {receipt.error}" for receipt in failed))
        if len(receipts) == channel.world_size:
            return [receipts[rank] for rank in range(channel.world_size)]
        left = deadline - time.monotonic()
        if left <= 0:
            missing = [rank for rank in range(channel.world_size) if rank not in receipts]
            raise DeadlineError(f"{name_ranks(missing)} did not report in time; the checkpoint was not committed")
        time.sleep(min(max(pause, time.monotonic() - began), left))
        pause = min(2 * pause, 0.05)
