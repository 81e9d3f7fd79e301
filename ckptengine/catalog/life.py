"""Who writes to a run: the lease of a whole life, by which a second job is told that the first one is alive."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import threading
import time
from typing import Any

from ckptengine.catalog.manifest import utc_now
from ckptengine.comm.process import Process
from ckptengine.errors import CheckpointError, RunInUseError, StorageError
from ckptengine.storage.base import Storage

__all__ = ["LIFE_SECONDS", "Life", "check_unused"]

LIFE_SECONDS = 40.0
"""After this long without renewal a writer on another machine counts as gone; renewed four times as often."""

_NAME = "writer.json"
_MAX_NBYTES = 4096
_LOOK_SECONDS = 1.0
_JOIN_SECONDS = 2.0

_log = logging.getLogger("ckptengine")


class Life:
    """One job's right to write to a run, held by rank 0 from `take` to `close`.

    It keeps two jobs from each other that both live. What a commit relies on is the generation: where this lease is
    lost, or can't be written, nothing is overwritten, and the job that began first learns it at its next commit.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._run = storage, name
        self._id = secrets.token_hex(8)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def take(self, timeout: float) -> None:
        """Become the writer of the run; nothing happens where this life is that already.

        Another job's writer that is gone is taken over: at once where it ran on this machine and its process has ended,
        else when it has not renewed its lease for `LIFE_SECONDS`, for which this waits `timeout` seconds at most.
        Raises `RunInUseError` where it lives. A storage that fails is logged: the claim of a generation will show.
        """
        if self._thread is not None:
            return
        try:
            self._take(time.monotonic() + timeout)
        except StorageError as error:
            _log.warning("%s: could not find out whether another job writes to it: %s", self._run, error)
            return
        self._thread = threading.Thread(target=self._renew, name="ckptengine-life", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            _log.warning(
                "%s: this job can't renew its hold, so another job may take the run over: %s", self._run, error
            )

    def _take(self, deadline: float) -> None:
        document = {"id": self._id, "since": utc_now(), **Process.this().to_json()}
        mine = json.dumps(document, sort_keys=True).encode()
        began, seen = time.monotonic(), None
        while not self._storage.put_if_absent(_NAME, mine):
            modified, holder = self._storage.modified(_NAME), self._holder()
            if modified is None or holder is None:
                if time.monotonic() < deadline:
                    continue  # it has been let go of just now
                raise StorageError(
                    errno.EAGAIN,
                    f"{self._storage.location(_NAME)} appears and disappears: another job creates and deletes it",
                )
            writer = Process.of_json(holder)
            alive = None if writer is None else writer != Process.this() and writer.is_alive()
            seen = modified if seen is None else seen
            left = LIFE_SECONDS - max(self._storage.now() - modified, time.monotonic() - began)
            if alive is None and modified == seen and left > 0 and time.monotonic() < deadline:
                # Neither seen to be alive nor to be gone: a lease that is renewed while we look is held.
                _tell_waiting(self._run, holder, left)
                time.sleep(min(left, _LOOK_SECONDS))
                continue
            if alive or (alive is None and (modified != seen or left > 0)):
                raise RunInUseError(
                    f"{self._run} is in use: process {holder.get('pid')} on {holder.get('host')} has been writing to "
                    f"it since {holder.get('since')}. Two jobs would fight over it, so this one must not train on: end "
                    "the other one first, or give this one a directory of its own. Where that process is beyond "
                    f"reach, delete {self._storage.location(_NAME)}"
                )
            self._storage.write_bytes(_NAME, mine)
            return

    def _holder(self) -> dict[str, Any] | None:
        """Return what the lease says, {} where it is damaged, None where there is none."""
        try:
            found = json.loads(self._storage.read_bytes(_NAME, _MAX_NBYTES))
        except StorageError:
            if self._storage.size(_NAME) is None:
                return None
            raise
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _renew(self) -> None:
        while not self._stop.wait(LIFE_SECONDS / 4):
            try:
                holder = self._holder()
                if holder is None or holder.get("id") != self._id:
                    return  # somebody else's: our next commit will be told
                self._storage.touch(_NAME)
            except CheckpointError:
                continue  # the next renewal may succeed; if none does, the lease rightly expires

    def close(self) -> None:
        """Let go of the run, where this life has it."""
        thread, self._thread = self._thread, None
        self._stop.set()
        if thread is None or os.getpid() != self._process:  # in a forked process it is the parent's
            return
        # A renewal that hangs in a stalled storage must not hold up the end.
        if thread.ident is not None:
            thread.join(_JOIN_SECONDS)
        if thread.is_alive():
            return
        try:
            holder = self._holder()
            if holder is not None and holder.get("id") == self._id:
                self._storage.delete(_NAME, durable=False)
        except CheckpointError:
            return  # it expires by itself


def check_unused(storage: Storage, doing: str) -> None:
    """Raise `RunInUseError` where a job writes to a run, or may; `doing` says what must not be done beside it.

    A writer on another machine counts as gone when it has not renewed its lease for `LIFE_SECONDS`. Raises
    `StorageError` where that can't be told.
    """
    life = Life(storage, storage.location())
    modified, holder = storage.modified(_NAME), life._holder()
    if modified is None or holder is None:
        return
    writer = Process.of_json(holder)
    alive = None if writer is None else writer.is_alive()
    if alive or (alive is None and storage.now() - modified < LIFE_SECONDS):
        raise RunInUseError(
            f"{storage.location()} is in use: process {holder.get('pid')} on {holder.get('host')} has been writing to "
            f"it since {holder.get('since')}. {doing} while no job writes to the run: end it first; one that has died "
            f"on another machine counts as gone after {LIFE_SECONDS:.0f} s"
        )


_waiting: set[str] = set()


def _tell_waiting(run: str, holder: dict[str, Any], seconds: float) -> None:
    """Say once what is waited for."""
    if str(holder.get("id")) in _waiting:
        return
    _waiting.add(str(holder.get("id")))
    _log.warning(
        "%s: process %s on %s was writing to it and may have ended; if it does not renew its lease within %.0f s, this "
        "job takes the run over",
        run,
        holder.get("pid"),
        holder.get("host"),
        seconds,
    )
