"""The uploader: copies committed checkpoints from faster tiers to the persistent one while training goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass

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
from ckptengine.tiers.overlay import Overlay
from ckptengine.tiers.pace import Pace

__all__ = ["Upload", "UploadPart", "Uploader", "upload_part"]

_RETRY_SECONDS = (5.0, 300.0)
"""The first pause after a failed upload, and the longest; each is twice the one before."""
_LOOK_SECONDS = 1.0
"""Between looks for a message where the store can't wait by itself, and between tries where it fails."""
_LOOKS_PER_SECOND = 100
"""How often all ranks together may look for a message where the store can't wait."""
_WAIT_SECONDS = 10.0
"""How long a look lasts where the store can wait, and how often a rank tells that its part goes on."""
_END_SECONDS = 5.0
"""How long the end waits for the thread, which a request to the storage may hold, or the deletion of what may go."""
_UPLOADED, _FAILED = b"+", b"-"
"""What rank 0 says when an upload is over."""

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class UploadPart:
    """One rank's part of an upload: files of an attempt's directory."""

    data: str
    attempt: str
    records: tuple[ArchiveRecord, ...]

    def encode(self) -> bytes:
        """Return it as it travels."""
        return json.dumps([self.data, self.attempt, [astuple(record) for record in self.records]]).encode()

    @classmethod
    def decode(cls, message: bytes) -> UploadPart:
        """Return what `encode` made."""
        data, attempt, records = json.loads(message)
        return cls(data, attempt, tuple(ArchiveRecord(*record) for record in records))


@dataclass(frozen=True, slots=True)
class Upload:
    """A committed checkpoint to be uploaded: its directory and manifest, and which rank reads each of its files."""

    directory: str
    manifest: Manifest
    holder: Mapping[str, int]

    @property
    def data(self) -> str:
        """The directory of its files."""
        return attempt_directory(self.directory, self.manifest.attempt)

    def shares(self, world_size: int) -> list[UploadPart]:
        """Return the ranks' parts."""
        records: list[list[ArchiveRecord]] = [[] for _ in range(world_size)]
        for record in (self.manifest.layout, *self.manifest.archives):
            records[self.holder[record.name]].append(record)
        return [UploadPart(self.data, self.manifest.attempt, tuple(own)) for own in records]


def upload_part(
    share: UploadPart,
    source: StorageView,
    persistent: Storage,
    pace: Pace | None = None,
    progress: Callable[[int], None] | None = None,
    found: Callable[[int], None] | None = None,
) -> None:
    """Copy the files of a share; what is there already is not copied again.

    `progress` and `found` are those of `copy_archive`.

    Raises `StorageError`, `CheckpointDamagedError`.
    """
    for record in share.records:
        copy_archive(
            source, persistent, join(share.data, record.name), record, pace=pace, progress=progress, found=found
        )


class _Stopped(Exception):
    """The job ends and does not wait for the upload."""


class Uploader:
    """Uploads on all ranks what rank 0 says; on rank 0 also decides what that is: always the newest there is.

    `source` has the faster tiers, `persistent` is where it goes. On rank 0 `uploaded` is called after each commit
    there, with the upload, and `own` returns the newest generation that this job has claimed, or found when it began,
    of a life that is over: one above is another job's. `leaders` are the other ranks that delete what their node has:
    there an attempt is protected until rank 0 says that its upload is over, for other ranks of the node may still read
    it, and `released` is called when it is uploaded. An upload that fails is told, and tried again until something
    newer is there: training never waits for it.

    It has many attributes: beside what it works with, they are what its thread and its callers tell each other.
    """

    def __init__(
        self,
        source: Overlay,
        persistent: Storage,
        comm: Communicator,
        store: KeyValueStore,
        token: str,
        uploaded: Callable[[Upload], None],
        released: Callable[[], None],
        leaders: Collection[int],
        own: Callable[[], int],
        pace: Pace | None,
    ) -> None:
        self._source, self._persistent, self._comm, self._store = source, persistent, comm, store
        self._prefix = f"ckptengine/move/{token}"
        self._uploaded, self._released, self._own, self._pace = uploaded, released, own, pace
        self._leaders = leaders
        self._changed = threading.Condition()
        self._next: Upload | None = None
        self._current: Upload | None = None
        self._attempt = ""  # what this rank is at
        self._hurried = self._stopped = False
        self._number = 0
        self._awaited = ""
        self._problem = ""
        self._progressed = self._told = time.monotonic()
        self._uploaded_nbytes = 0
        self._thread = threading.Thread(target=self._run, name="ckptengine-uploader", daemon=True)
        self._thread.start()

    def offer(self, upload: Upload) -> None:
        """Have a checkpoint uploaded next, on rank 0; one that was offered before and is not begun is passed over."""
        with self._changed:
            if self._next is not None:
                _log.info(
                    "%s: not uploaded to %s, since a newer checkpoint is there",
                    self._next.directory,
                    self._persistent.location(),
                )
            self._next = upload
            self._changed.notify_all()

    @property
    def protected(self) -> set[str]:
        """The attempts that are needed here until they are uploaded."""
        with self._changed:
            known = {upload.manifest.attempt for upload in (self._next, self._current) if upload is not None}
            return known | ({self._attempt} if self._attempt else set())

    def release(self) -> None:
        """Protect nothing any more on a rank that follows: the upload that it had a part in is over."""
        with self._changed:
            self._attempt = ""

    def pending(self) -> Upload | None:
        """Return what is on its way, or is next."""
        with self._changed:
            return self._next or self._current

    def settle(self, timeout: float, watch: Callable[[int], None]) -> bool:
        """Wait on rank 0 until all that was offered is there; return whether it is, after `timeout` seconds at most.

        `watch` is called now and then with the bytes of the present upload that this rank has copied. From now on
        pauses between tries are short.
        """
        end = time.monotonic() + timeout
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            while self._next is not None or self._current is not None:
                if time.monotonic() > end:
                    return False
                self._changed.wait(0.2)
                watch(self._uploaded_nbytes)
            self._hurried = False
        return True

    def still(self, since: float) -> tuple[float, str]:
        """Return for how many seconds nothing has moved, counted from the moment `since` on, and what kept it."""
        seconds = time.monotonic() - max(since, self._progressed)
        with self._changed:
            return seconds, self._problem or f"no byte has come to {self._persistent.location()} for {seconds:.0f} s"

    def stop(self, wait: bool = True) -> None:
        """End the thread at its next step, whatever is on its way: that is uploaded after the next start.

        Without `wait` the thread is not waked, and ends some seconds later.
        """
        with self._changed:
            self._stopped = True
            awaited = self._awaited
            self._changed.notify_all()
        if not wait or not self._thread.is_alive() or threading.current_thread() is self._thread:
            return
        # A thread that is still in a call of the store when the interpreter ends would abort the process. The store may
        # be gone, with the rank that was its host.
        with contextlib.suppress(CheckpointError):
            if awaited and self._store.blocks:
                put_large(self._store, awaited, b"")
        self._thread.join(_END_SECONDS)
        with contextlib.suppress(CheckpointError):
            if awaited and self._store.blocks:
                delete_large(self._store, awaited)

    def _run(self) -> None:
        try:
            self._lead() if self._comm.rank == 0 else self._follow()
        except _Stopped:
            return
        except Exception as error:
            _log.exception("%s: uploads have stopped until the job restarts: %s", self._persistent.location(), error)

    def _lead(self) -> None:
        pause = _RETRY_SECONDS[0]
        while True:
            with self._changed:
                while self._next is None and not self._stopped:
                    self._changed.wait()
                if self._stopped or self._next is None:
                    return
                upload, self._next = self._next, None
                self._current = upload
            try:
                self._upload(upload)
                problem = ""
            except _Stopped:
                raise
            except Exception as error:
                problem = f"{error}" or type(error).__name__
            gone = bool(problem) and self._gone(upload)
            with self._changed:
                self._current, self._attempt = None, ""
                self._changed.notify_all()
                if not problem:
                    self._problem, pause = "", _RETRY_SECONDS[0]
                    continue
                if problem != self._problem:
                    _log.warning(
                        "step %s is not uploaded to %s yet; training continues, and the upload is tried again: %s",
                        upload.manifest.step,
                        self._persistent.location(),
                        problem,
                    )
                self._problem = problem
                if self._next is None and not gone:
                    self._next = upload
                self._changed.wait_for(lambda: self._stopped or self._hurried, pause)
                if self._hurried:
                    self._changed.wait_for(lambda: self._stopped, min(pause, _RETRY_SECONDS[0]))
                pause = min(2 * pause, _RETRY_SECONDS[1])

    def _gone(self, upload: Upload) -> bool:
        """Return whether a checkpoint is in no faster tier any more."""
        name = join(upload.directory, manifest_name(upload.manifest.generation))
        try:
            self._source.forget()
            return self._source.size(name) is None
        except CheckpointError:
            return False

    def _upload(self, upload: Upload) -> None:
        """Upload a checkpoint with the other ranks' help, and commit it; on rank 0."""
        persistent, self._uploaded_nbytes = self._persistent, 0
        own = max(upload.manifest.generation, self._own())
        later = [number for number in claimed_generations(persistent) if number > own]
        if later:
            raise SaveFailedError(
                f"{persistent.location()} was taken over by generation {max(later)}, this job writes generation "
                f"{own}: end it, or restore and continue from what the other job has saved"
            )
        with Lease(persistent, upload.data):
            mine, *others = upload.shares(self._comm.world_size)
            self._number += 1
            for rank, share in enumerate(others, 1):
                self._send(f"{self._prefix}/{self._number}/{rank}", share.encode())
            word = _FAILED
            try:
                self._finish(upload, mine)
                word = _UPLOADED
            finally:
                for rank in self._leaders:
                    self._send(self._over(rank), word)
        self._uploaded(upload)

    def _finish(self, upload: Upload, mine: UploadPart) -> None:
        """Do rank 0's part, wait for the others' and commit."""
        error = self._upload_part(mine)
        errors = {0: error} if error else {}
        # All answer, whatever has come of it here: the next number is one that all wait for.
        for rank in range(1, self._comm.world_size):
            if reply := self._receive(f"{self._prefix}/{self._number}/done/{rank}", self._going(rank)):
                errors[rank] = reply.decode()
            self._forget(self._going(rank))
        if errors:
            raise SaveFailedError("; ".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
        copy_commit(self._source, self._persistent, upload.directory, upload.manifest)

    def _follow(self) -> None:
        rank = self._comm.rank
        while True:
            self._number += 1
            share = UploadPart.decode(self._receive(f"{self._prefix}/{self._number}/{rank}"))
            self._send(f"{self._prefix}/{self._number}/done/{rank}", self._upload_part(share).encode())
            word = self._receive(self._over(rank)) if rank in self._leaders else _FAILED
            self.release()
            if word == _UPLOADED:
                self._released()

    def _over(self, rank: int) -> str:
        """Return the key under which rank 0 tells that the present upload is over."""
        return f"{self._prefix}/{self._number}/over/{rank}"

    def _going(self, rank: int) -> str:
        """Return the key under which a rank tells that its part of the present upload goes on."""
        return f"{self._prefix}/{self._number}/going/{rank}"

    def _upload_part(self, share: UploadPart) -> str:
        """Do this rank's part of an upload; return what went wrong."""
        with self._changed:
            self._attempt = share.attempt
        self._source.forget()  # another tier may have it now
        try:
            upload_part(share, self._source, self._persistent, self._pace, self._progress, self._found)
        except _Stopped:
            raise
        except Exception as error:
            return f"{error}" or type(error).__name__
        return ""

    def _progress(self, nbytes: int) -> None:
        self._uploaded_nbytes += nbytes
        self._progressed = now = time.monotonic()
        if self._stopped:
            raise _Stopped
        if self._comm.rank != 0 and now - self._told > _WAIT_SECONDS:
            self._told = now
            # Rank 0 gives up on an upload of which it hears nothing; the next word does as well as this one.
            with contextlib.suppress(CheckpointError):
                self._store.set(self._going(self._comm.rank), str(self._uploaded_nbytes).encode())

    def _send(self, key: str, message: bytes) -> None:
        """Leave a message; tried until it is there, for whoever waits for it has nothing else to wait for."""
        while True:
            try:
                put_large(self._store, key, message)
                return
            except CheckpointError as error:
                self._rest(f"{error}")

    def _receive(self, key: str, going: str = "") -> bytes:
        """Return a message as soon as it is there; what waits is ended by `stop`.

        `going` is the key of the words that tell that it is still to come.
        """
        with self._changed:
            self._awaited = key
        word: bytes | None = None
        while True:
            with self._changed:
                if self._stopped:
                    raise _Stopped
            try:
                data = get_large(self._store, key, _WAIT_SECONDS if self._store.blocks else 0.0)
                latest = self._store.get(going, 0.0) if going and data is None else word
            except CheckpointError as error:
                self._rest(f"{error}")
                continue
            if data is not None:
                with self._changed:
                    if self._stopped:  # it may be the word by which `stop` wakes this thread, and no rank's
                        raise _Stopped
                self._forget(key)
                self._progressed = time.monotonic()
                return data
            if latest != word:
                word, self._progressed = latest, time.monotonic()
            if not self._store.blocks:
                self._rest("", 0.0 if going else self._comm.world_size / _LOOKS_PER_SECOND)

    def _found(self, nbytes: int) -> None:
        """Count what an earlier try has copied: nothing has moved, or a commit that fails would be tried for ever."""
        self._uploaded_nbytes += nbytes

    def _forget(self, key: str) -> None:
        with contextlib.suppress(CheckpointError):
            delete_large(self._store, key)

    def _rest(self, problem: str, least: float = 0.0) -> None:
        """Pause before the next look or try, noting what kept this one."""
        with self._changed:
            self._problem = problem or self._problem
            self._changed.wait_for(lambda: self._stopped, max(least, _LOOK_SECONDS))
            if self._stopped:
                raise _Stopped
