"""The lease: how others see that an attempt's writer is alive."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from types import TracebackType

from ckptengine.comm.process import Process
from ckptengine.errors import CheckpointError, StorageError
from ckptengine.storage.base import Storage, join

__all__ = ["LEASE_SECONDS", "Lease", "is_leased", "is_old"]

LEASE_SECONDS = 120.0
"""After this long without renewal an attempt counts as given up; renewed four times as often."""

_NAME = "lease.json"
_JOIN_SECONDS = 10.0

_log = logging.getLogger("ckptengine")


class Lease:
    """Holds an attempt's directory from entering to leaving; renews itself in a thread of its own.

    Where no thread can be had, as where memory is short, it lasts `LEASE_SECONDS` from entering, which is logged.
    """

    def __init__(self, storage: Storage, directory: str) -> None:
        self._storage = storage
        self._name = join(directory, _NAME)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="ckptengine-lease", daemon=True)

    def __enter__(self) -> Lease:
        # After a crash of the machine the writer is gone, and so may its lease be.
        self._storage.write_bytes(self._name, json.dumps(Process.this().to_json()).encode(), durable=False)
        try:
            self._thread.start()
        except RuntimeError as error:
            _log.warning(
                "%s: nothing renews this lease (%s): a save longer than %.0f s may be "
                "taken for given up by a job on another machine, and then it fails",
                self._storage.location(self._name),
                error,
                LEASE_SECONDS,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # A renewal that hangs in a stalled storage must not hold up the save.
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)
        try:
            self._storage.delete(self._name)
        except CheckpointError:
            return  # it expires by itself

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 4):
            try:
                self._storage.touch(self._name)
            except CheckpointError:
                continue  # the next renewal may succeed; if none does, the lease rightly expires


def is_leased(storage: Storage, directory: str) -> bool:
    """Return whether the writer of an attempt's directory may still be alive.

    A writer on this very machine is looked up by its process; for others the age of the lease decides (or of
    the directory, where the lease has not been written yet), by the storage's own clock. A lease that can't be read
    counts as held.
    """
    name = join(directory, _NAME)
    modified = storage.modified(name)
    if modified is None:
        modified = storage.modified(directory)
        return modified is not None and not _is_old(storage, directory, modified, storage.now())
    try:
        holder = Process.of_json(json.loads(storage.read_bytes(name, 4096)))
    except StorageError:
        return True  # its holder may live, or has let go of it just now; a later sweep will see
    except (ValueError, RecursionError):
        holder = None  # damaged: its age decides
    alive = None if holder is None else holder.is_alive()
    if alive is not None:
        return alive
    return not _is_old(storage, name, modified, storage.now())


def is_old(storage: Storage, name: str, now: float) -> bool:
    """Return whether a file or directory was last written longer ago than a lease lasts.

    `now` is the storage's time. What is dated in the future, as after a clock was set back, gets the present date: a
    living writer sets its own again, and a dead one's is old at a later look. What is missing is not old.
    """
    modified = storage.modified(name)
    return modified is not None and _is_old(storage, name, modified, now)


def _is_old(storage: Storage, name: str, modified: float, now: float) -> bool:
    if modified > now + LEASE_SECONDS:
        with contextlib.suppress(CheckpointError):
            storage.touch(name)
        return False
    return now - modified >= LEASE_SECONDS
