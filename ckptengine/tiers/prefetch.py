"""Bringing a checkpoint to a local directory before a job starts."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ckptengine.archive.reader import check_size
from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.lease import Lease
from ckptengine.catalog.listing import Entry, Problem, committed, lineage, newest, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    StorageError,
)
from ckptengine.storage.base import Storage, join
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.parallel import in_parallel
from ckptengine.tiers.copy import check_same_run, copy_archive, copy_commit, is_committed
from ckptengine.tiers.lock import locked

__all__ = ["Prefetched", "prefetch"]

_LOCK = "prefetch.lock"
_ARCHIVES = 4
"""Archives on their way at once, each with several requests: one's beginning and end don't leave the network idle."""
_LOOKS = 8  # files that are looked up at once
_TRIES = 5
"""How often to look anew where the job that writes the run deletes what is being fetched."""


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What has come of it.

    `path` is the checkpoint's directory in the target, `nbytes` the size of its files together, `moved_nbytes` what had
    to be fetched of them. `damaged` are messages about newer checkpoints that could not be used.
    """

    path: str
    step: int | None
    generation: int
    nbytes: int
    moved_nbytes: int
    damaged: tuple[str, ...]


def prefetch(
    source: Storage,
    target: LocalStorage,
    *,
    step: int | None = None,
    timeout: float = 3600.0,
    tell: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prefetched | None:
    """Bring the newest whole checkpoint of a run, or one step of it, or a checkpoint by itself, to a directory.

    Files that are there are not fetched again, and what else is there is left alone. Where the newest is damaged, the
    one before it along the lineage is taken, as a restore does. A target that has a newer one of the run, whole, keeps
    that. Of several processes that fetch to one directory one works, and the others wait for at most `timeout` seconds
    until it is done.

    `tell` is called with what a user should know meanwhile, `progress` with the bytes that are there and all of them.
    Returns None where the source has no checkpoint.

    Raises `CheckpointNotFoundError` where there is no such step, `CheckpointDamagedError` where none is complete,
    `StorageError`: EEXIST where the target holds another run, ENOSPC where there is no room, before anything is
    fetched, ESTALE where each checkpoint is deleted before it is here; `DeadlineError`, `FormatVersionError`.
    """
    fetch = _Fetch(source, target, step, tell or (lambda text: None), progress or (lambda done, total: None))
    target.create()
    with locked(target.location(_LOCK), timeout, lambda holder: fetch.tell(f"waiting for {holder}, which fetches too")):
        for _ in range(_TRIES):
            try:
                return fetch.run()
            except _Gone:
                continue
    raise StorageError(
        errno.ESTALE,
        f"{source.location()}: its checkpoints are deleted faster than they can be fetched: keep more of them "
        "(keep_last=)",
    )


class _Gone(Exception):
    """The checkpoint was deleted while it was fetched."""


class _Stopped(Exception):
    """Another thread has failed."""


@dataclass(slots=True)
class _Fetch:
    source: Storage
    target: LocalStorage
    step: int | None
    tell: Callable[[str], None]
    progress: Callable[[int, int], None]
    damaged: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    """The files of the present checkpoint that this process has fetched."""

    def run(self) -> Prefetched | None:
        """Fetch the first of the candidates that is whole."""
        self.damaged.clear()
        found = False
        for item in self._candidates():
            found = True
            if isinstance(item, Problem):
                if not isinstance(item.error, CheckpointDamagedError):
                    self._check_there(item.entry)
                    raise item.error
                self._damage(item.entry, item.error)
                continue
            entry, manifest = item
            try:
                return self._fetch(entry, manifest)
            except (CheckpointDamagedError, StorageError) as error:
                self._check_there(entry)
                if isinstance(error, StorageError):
                    raise
                self._damage(entry, error)
                self._forget(entry, manifest)
        if not found:
            return None
        raise CheckpointDamagedError(f"{self.source.location()}: no checkpoint is complete: {'; '.join(self.damaged)}")

    def _candidates(self) -> Iterator[tuple[Entry, Manifest] | Problem]:
        if self.step is None:
            yield from lineage(self.source)
            return
        there = committed(self.source)
        entry = max((one for one in there if one.step == self.step), key=lambda one: one.order, default=None)
        if entry is None:
            steps = ", ".join(str(one.step) for one in there[-10:] if one.step is not None)
            has = f"there are steps {steps}" if steps else "it has no checkpoint of a step yet"
            raise CheckpointNotFoundError(
                f"{self.source.location()}: no committed checkpoint of step {self.step}; {has}"
            )
        try:
            yield entry, read_manifest(self.source, entry)
        except CheckpointError as error:
            yield Problem(entry, error)

    def _check_there(self, entry: Entry) -> None:
        if self.source.size(entry.manifest) is None:
            raise _Gone

    def _damage(self, entry: Entry, error: CheckpointError) -> None:
        self.damaged.append(str(error))
        instead = "" if self.step is not None else "; the previous checkpoint is tried"
        self.tell(f"{self.source.location(entry.directory)} is damaged{instead}: {error}")

    def _fetch(self, entry: Entry, manifest: Manifest) -> Prefetched:
        """Fetch one checkpoint."""
        self._check_kind(entry)
        is_same_run = check_same_run(self.source, self.target)
        newer = self._newer(entry) if is_same_run and self.step is None else None
        if newer is not None:
            return self._result(*newer, 0)
        data = attempt_directory(entry.directory, manifest.attempt)
        records = manifest.layout, *manifest.archives
        missing = [record for record in records if self.target.size(join(data, record.name)) != record.nbytes]
        if is_committed(self.source, self.target, entry.directory, manifest) and not missing:
            return self._result(entry, manifest, 0)
        self.made.clear()
        _check_sizes(self.source, data, records)
        # Nobody else is at it: they are those of a process that was killed, and take the room of the whole file.
        for name in self.target.temporaries(data):
            self.target.delete(join(data, name))
        self._check_room(missing)
        with Lease(self.target, data):
            moved = self._copy(data, records, manifest.nbytes)
            copy_commit(self.source, self.target, entry.directory, manifest)
        return self._result(entry, manifest, moved)

    def _forget(self, entry: Entry, manifest: Manifest) -> None:
        """Delete what was fetched of a checkpoint that can't be had: the next one needs the room.

        What was there before stays: it may be all that there is of this checkpoint.
        """
        if not self.target.exists(entry.manifest):
            for name in self.made:
                self.target.delete(name)
            self.target.remove_directory(attempt_directory(entry.directory, manifest.attempt))
            if entry.directory:
                self.target.remove_directory(entry.directory)

    def _copy(self, data: str, records: tuple[ArchiveRecord, ...], total: int) -> int:
        """Copy files, several at once, and return the bytes that were moved; the first failure ends them all."""
        lock, stop = threading.Lock(), threading.Event()
        done = moved = 0

        def report(nbytes: int) -> None:
            nonlocal done
            if stop.is_set():
                raise _Stopped
            with lock:
                done += nbytes
                self.progress(done, total)

        def copy(record: ArchiveRecord) -> None:
            nonlocal moved
            try:
                nbytes = copy_archive(self.source, self.target, join(data, record.name), record, progress=report)
            except _Stopped:
                return  # `in_parallel` raises what the other one did
            except BaseException:
                stop.set()
                raise
            with lock:
                moved += nbytes
                self.made += [join(data, record.name)] if nbytes else []

        try:
            in_parallel(copy, records, _ARCHIVES)
        finally:
            stop.set()
        return moved

    def _check_kind(self, entry: Entry) -> None:
        """Raise where a checkpoint by itself would come into a run's directory, or the other way round."""
        there = newest(self.target)
        if there is None or (
            bool(there.directory) == bool(entry.directory) and (entry.directory or _fits(there, entry))
        ):
            return
        what = f"step {there.step} of a run" if there.directory else "a checkpoint by itself"
        raise StorageError(
            errno.EEXIST,
            f"{self.target.location()} holds {what}, not {self.source.location()}: give another directory",
        )

    def _newer(self, entry: Entry) -> tuple[Entry, Manifest] | None:
        """Return a newer checkpoint of the run that the target has already, whole."""
        there = newest(self.target)
        if there is None or there.order <= entry.order:
            return None
        try:
            manifest = read_manifest(self.target, there)
            data = attempt_directory(there.directory, manifest.attempt)
            _check_sizes(self.target, data, (manifest.layout, *manifest.archives))
        except CheckpointDamagedError:
            return None
        return there, manifest

    def _check_room(self, missing: list[ArchiveRecord]) -> None:
        needed, status = sum(record.nbytes for record in missing), os.statvfs(self.target.location())
        available = status.f_bavail * status.f_frsize
        if needed > available:
            raise StorageError(
                errno.ENOSPC,
                f"{self.target.location()}: {needed:,} bytes are needed and {available:,} are available "
                f"({os.strerror(errno.ENOSPC)}); make room or give another directory",
            )

    def _result(self, entry: Entry, manifest: Manifest, moved: int) -> Prefetched:
        path = self.target.location(entry.directory)
        damaged = tuple(self.damaged)
        return Prefetched(path, manifest.step, manifest.generation, manifest.nbytes, moved, damaged)


def _fits(there: Entry, entry: Entry) -> bool:
    """Return whether a checkpoint by itself may come after the one that is there; which it is shows in its manifest."""
    return there.generation <= entry.generation


def _check_sizes(storage: Storage, data: str, records: tuple[ArchiveRecord, ...]) -> None:
    """Look at all files before any is moved; raises `CheckpointDamagedError` naming one that isn't there as it was."""
    in_parallel(lambda record: check_size(storage, join(data, record.name), record), records, _LOOKS)
