"""The mover: takes committed checkpoints from near tiers to the run's own place while training goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.lease import Lease
from ckptengine.catalog.listing import claimed_generations, manifest_name
from ckptengine.catalog.manifest import Manifest
from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.comm.keyvalue import delete_large, get_large, put_large
from ckptengine.errors import CheckpointError, SaveFailedError
from ckptengine.storage.base import Storage, StorageView, join
from ckptengine.tiers.copy import copy_archive, copy_commit
from ckptengine.tiers.pace import Pace

__all__ = ["Load", "Mover", "carry"]

_RETRY_SECONDS = (5.0, 300.0)
"""The first pause after a failed move, and the longest; each is twice the one before."""
_LOOK_SECONDS = 1.0
"""Between looks for a message where the store can't wait by itself."""

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class Load:
    """A committed checkpoint to be moved: its directory and manifest, and which rank reads each of its files."""

    directory: str
    manifest: Manifest
    holder: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return self.manifest.nbytes

    def encode(self) -> bytes:
        """Return it as it travels."""
        manifest = self.manifest.encode().decode()
        return json.dumps({"directory": self.directory, "manifest": manifest, "holder": dict(self.holder)}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Load:
        """Return what `encode` made."""
        document = json.loads(data)
        manifest = Manifest.decode(document["manifest"].encode(), document["directory"])
        return cls(document["directory"], manifest, document["holder"])


def carry(
    load: Load,
    source: StorageView,
    home: Storage,
    rank: int,
    pace: Pace | None = None,
    progress: Callable[[int], None] | None = None,
    found: Callable[[int], None] | None = None,
) -> None:
    """Copy those files of a load that this rank is to read; what is there already is not copied again.

    `progress` and `found` are those of `copy_archive`.

    Raises `StorageError`, `CheckpointDamagedError`.
    """
    data = attempt_directory(load.directory, load.manifest.attempt)
    records: tuple[ArchiveRecord, ...] = (load.manifest.layout, *load.manifest.archives)
    for record in records:
        if load.holder.get(record.name) == rank:
            copy_archive(source, home, join(data, record.name), record, pace=pace, progress=progress, found=found)


class _Stopped(Exception):
    """The job ends and does not wait for the move."""


class Mover:
    """Moves on all ranks what rank 0 says; on rank 0 also decides what that is: always the newest there is.

    `source` has the near tiers, `home` is where it goes. `moved` is called on rank 0 after each commit there, with the
    load. A move that fails is told, and tried again until something newer is there: training never waits for it.
    """

    def __init__(
        self,
        source: StorageView,
        home: Storage,
        comm: Communicator,
        store: KeyValueStore,
        token: str,
        moved: Callable[[Load], None],
        pace: Pace | None,
    ) -> None:
        self._source, self._home, self._comm, self._store = source, home, comm, store
        self._prefix = f"ckptengine/move/{token}"
        self._moved, self._pace = moved, pace
        self._changed = threading.Condition()
        self._next: Load | None = None
        self._current: Load | None = None
        self._closing = self._stopped = False
        self._number = 0
        self._problem = ""
        self._progressed = time.monotonic()
        self._moved_nbytes = 0
        self._thread = threading.Thread(target=self._run, name="ckptengine-mover", daemon=True)
        self._thread.start()

    def offer(self, load: Load) -> None:
        """Have a checkpoint moved next, on rank 0; one that was offered before and is not begun is passed over."""
        with self._changed:
            if self._next is not None:
                _log.info("%s: passed over on the way to %s", self._next.directory, self._home.location())
            self._next = load
            self._changed.notify_all()

    @property
    def protected(self) -> set[str]:
        """The attempts that are needed here until they are moved."""
        with self._changed:
            return {load.manifest.attempt for load in (self._next, self._current) if load is not None}

    def pending(self) -> Load | None:
        """Return what is on its way, or is next."""
        with self._changed:
            return self._next or self._current

    def settle(self, timeout: float, watch: Callable[[int], None]) -> bool:
        """Wait on rank 0 until all that was offered is there; return whether it is, after `timeout` seconds at most.

        `watch` is called now and then with the bytes of the present move that this rank has brought.
        """
        end = time.monotonic() + timeout
        with self._changed:
            while self._next is not None or self._current is not None:
                if time.monotonic() > end:
                    return False
                self._changed.wait(0.2)
                watch(self._moved_nbytes)
        return True

    def still(self, since: float) -> tuple[float, str]:
        """Return for how many seconds nothing has moved, counted from the moment `since` on, and what kept it."""
        seconds = time.monotonic() - max(since, self._progressed)
        with self._changed:
            return seconds, self._problem or f"no byte has come to {self._home.location()} for {seconds:.0f} s"

    def close(self, timeout: float) -> None:
        """End the thread: on rank 0 after what is being moved, on the others when rank 0 says so.

        The others wait for that as long as moves go on, and `timeout` seconds beyond.
        """
        with self._changed:
            self._closing = True
            self._progressed = time.monotonic()
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(0.2)
            if time.monotonic() - self._progressed > timeout:
                self.stop()
                break

    def stop(self) -> None:
        """End the thread at its next step, whatever is on its way: it is moved after the next start."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._lead() if self._comm.rank == 0 else self._follow()
        except _Stopped:
            return
        except Exception as error:
            _log.error("%s: nothing more is moved there in this life: %s", self._home.location(), error)

    def _lead(self) -> None:
        pause = _RETRY_SECONDS[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closing or self._stopped)
                if self._stopped or self._next is None:
                    break
                load, self._next = self._next, None
                self._current = load
            try:
                self._move(load)
                problem = ""
            except _Stopped:
                break
            except Exception as error:
                problem = f"{error}" or type(error).__name__
            with self._changed:
                self._current = None
                self._changed.notify_all()
                if not problem:
                    self._problem, pause = "", _RETRY_SECONDS[0]
                    continue
                if problem != self._problem:
                    _log.warning(
                        "step %s is not in %s yet, training goes on and it is tried again: %s",
                        load.manifest.step,
                        self._home.location(),
                        problem,
                    )
                self._problem = problem
                if self._next is None and not self._gone(load):
                    self._next = load
                # Whoever waits has a limit of their own.
                self._changed.wait_for(lambda: self._stopped, min(pause, 1.0) if self._closing else pause)
                pause = min(2 * pause, _RETRY_SECONDS[1])
        self._tell_all(b"")

    def _gone(self, load: Load) -> bool:
        """Return whether a checkpoint is in no near tier any more."""
        name = join(load.directory, manifest_name(load.manifest.generation))
        try:
            return self._source.size(name) is None
        except CheckpointError:
            return False

    def _tell_all(self, message: bytes) -> None:
        self._number += 1
        for rank in range(1, self._comm.world_size):
            with contextlib.suppress(CheckpointError):
                put_large(self._store, f"{self._prefix}/{self._number}/{rank}", message)

    def _move(self, load: Load) -> None:
        """Move a checkpoint with the other ranks' help, and commit it; on rank 0."""
        home, self._moved_nbytes = self._home, 0
        later = [number for number in claimed_generations(home) if number > load.manifest.generation]
        if later:
            raise SaveFailedError(
                f"{home.location()} was taken over by generation {max(later)}, this job writes generation "
                f"{load.manifest.generation}: end it, or restore and go on from what the other has saved"
            )
        with Lease(home, attempt_directory(load.directory, load.manifest.attempt)):
            self._tell_all(load.encode())
            errors = {}
            try:
                carry(load, self._source, home, 0, self._pace, self._progress, self._found)
            except CheckpointError as error:
                errors[0] = f"{error}"
            errors |= self._collect()
            if errors:
                raise SaveFailedError("; ".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
            copy_commit(self._source, home, load.directory, load.manifest)
        self._moved(load)

    def _collect(self) -> dict[int, str]:
        """Return what went wrong on other ranks, by rank, once all have answered."""
        errors: dict[int, str] = {}
        for rank in range(1, self._comm.world_size):
            reply = self._receive(f"{self._prefix}/{self._number}/done/{rank}")
            if reply:
                errors[rank] = reply.decode()
        return errors

    def _follow(self) -> None:
        while True:
            self._number += 1
            message = self._receive(f"{self._prefix}/{self._number}/{self._comm.rank}")
            if not message:
                return
            load = Load.decode(message)
            with self._changed:
                self._current = load
            error = ""
            try:
                carry(load, self._source, self._home, self._comm.rank, self._pace, self._progress, self._found)
            except CheckpointError as problem:
                error = f"{problem}" or type(problem).__name__
            with self._changed:
                self._current = None
            put_large(self._store, f"{self._prefix}/{self._number}/done/{self._comm.rank}", error.encode())

    def _receive(self, key: str) -> bytes:
        """Return a message as soon as it is there; what waits is ended by `stop`."""
        while True:
            with self._changed:
                if self._stopped:
                    raise _Stopped
            data = get_large(self._store, key, 10.0 if self._store.blocks else 0.0)
            if data is not None:
                delete_large(self._store, key)
                self._progressed = time.monotonic()
                return data
            if not self._store.blocks:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped, _LOOK_SECONDS)

    def _found(self, nbytes: int) -> None:
        """Count what an earlier try has brought: nothing has moved, or a commit that fails would be tried for ever."""
        self._moved_nbytes += nbytes

    def _progress(self, nbytes: int) -> None:
        self._moved_nbytes += nbytes
        self._progressed = time.monotonic()
        if self._stopped:
            raise _Stopped
