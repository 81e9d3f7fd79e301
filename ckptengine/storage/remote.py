"""Object stores, and all that fsspec opens: objects in place of files, conditional writes in place of links."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.base import Storage, check_name, join
from ckptengine.storage.budget import Budget
from ckptengine.storage.connect import connect
from ckptengine.storage.objects import Objects, Stat, Unfinished
from ckptengine.storage.parallel import in_parallel
from ckptengine.storage.retry import Patience, Request, persist
from ckptengine.storage.upload import RemoteArchiveWriter, part_nbytes_for

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["RemoteStorage"]

_T = TypeVar("_T")
_Names = list[str]
_Unfinished = list[tuple[str, float]]

_TEMPORARY = ".tmp-"
_SMALL = 64 << 10

_log = logging.getLogger("ckptengine")
_told: set[tuple[str, str]] = set()
_told_lock = threading.Lock()


class RemoteStorage(Storage):
    """Objects below a URL that fsspec opens. Nothing is connected before the first use.

    `location` is `PROTOCOL://PATH` without credentials; `options` are fsspec's `storage_options`, whose values never
    appear in a message. No operation takes longer than `timeout` seconds, None: two minutes and what its bytes take.
    Directories don't exist here: one is there while anything is below it.
    """

    leaves_temporaries = False  # an upload appears as a whole; what is left of one shows in `unfinished`

    def __init__(
        self,
        location: str,
        options: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
        patience: Patience | None = None,
        timeout: float | None = None,
    ) -> None:
        self._location = location.rstrip("/")
        self._options = dict(options or {})
        self._budget, self._patience = budget or Budget(), (patience or Patience()).within(timeout)
        self._lock = threading.Lock()
        self._opened: tuple[int, Objects] | None = None
        self._atomic: bool | None = None

    def __repr__(self) -> str:
        return f"RemoteStorage({self._location!r})"

    def __getstate__(self) -> object:
        raise TypeError(f"{self!r} holds credentials and connections: open {self._location} anew in the other process")

    @property
    def _objects(self) -> Objects:
        with self._lock:
            # The connections and the event loop are not there in a forked process.
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = os.getpid(), connect(self._location, self._options)
            return self._opened[1]

    def _do(self, operation: str, name: str, call: Callable[[Objects, Request], _T], nbytes: int = 0) -> _T:
        """Make a request that moves about `nbytes` bytes."""
        objects, patience = self._objects, self._patience.for_bytes(nbytes)
        return persist(operation, self.location(name), lambda request: call(objects, request), patience, objects)

    def _get(self, name: str, position: int, nbytes: int) -> bytes | memoryview:
        """Return bytes of an object, fewer only where it ends before."""
        return self._do("read", name, lambda objects, one: objects.get(name, position, nbytes, one.left), nbytes)

    def create(self) -> None:
        """Check that the root can be written to, and find out whether the store decides who is first."""
        self._can_create()
        if not self._objects.needs_probe:
            self.now()

    def check_writable(self) -> None:
        """Raise where the place can't even be listed."""
        self._do("list", "", lambda objects, request: objects.list("", request.left))

    def check_shared(self, ranks: int) -> None:
        """Raise where the place is this process's memory, and other ranks are to find something in it."""
        if ranks > 1 and self._location.rpartition("::")[2].startswith("memory://"):
            raise StorageError(
                errno.EINVAL,
                f"{self._location}: memory:// is the memory of one process, and can't be seen by the other processes "
                f"of {ranks} "
                "ranks: give a directory or a bucket that all ranks see",
            )

    def make_directory(self, name: str) -> None:
        """Do nothing but check the name."""
        check_name(name)

    def write_bytes(self, name: str, data: Buffer, *, durable: bool = True) -> None:
        """Write a small object; it is durable with the store's reply."""
        key, body = check_name(name), bytes(data)
        self._do("write", name, lambda objects, request: objects.put(key, body, request.left))

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Write a small object unless there is one, by a conditional write.

        Where it is refused or its reply is lost, what is there is read back: our own bytes are our success. A store
        that knows no conditional writes is asked first and written then, which leaves a gap between the two: see
        `docs/storage.md`.
        """
        key, body = check_name(name), bytes(data)
        if not self._can_create():
            if self.size(name) is not None:
                return False
            try:
                self.write_bytes(name, body)
            except StorageError as error:
                return self._read_back(key, body, error)
            return True
        return self._create(key, body)

    def _create(self, key: str, body: bytes) -> bool:
        try:
            self._do("publish", key, lambda objects, request: objects.create(key, body, request.left))
            return True
        except StorageError as error:
            return self._read_back(key, body, error)

    def _read_back(self, key: str, body: bytes, problem: StorageError) -> bool:
        """Return whether what is there is ours, after a write that was refused or had no answer.

        A reply may have been lost, and the request been made again, by the HTTP library too, which does not say so.
        Whatever came of it shows in what is there now. Raises `StorageError`: ETIMEDOUT where that is not known.
        """
        if problem.errno not in (errno.EEXIST, errno.ETIMEDOUT, errno.EIO):
            raise problem
        try:
            found = self._found(key, len(body))
        except StorageError as error:
            text = f"{problem.strerror}; what came of it can't be read: {error.strerror}"
            raise StorageError(errno.ETIMEDOUT, text) from error
        if found is not None:
            return found == body
        if problem.errno == errno.EEXIST:
            return False  # it has been deleted since
        # The store may still be at it.
        raise StorageError(errno.ETIMEDOUT, f"{problem.strerror}; it is not known whether the store carried it out")

    def _found(self, key: str, nbytes: int) -> bytes | None:
        """Return what is there of an object, one byte more than `nbytes` at most; None where there is none."""
        try:
            return bytes(self._get(key, 0, nbytes + 1))
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def create_archive(self, name: str, nbytes: int, *, write_nbytes: int | None = None) -> RemoteArchiveWriter:
        """Return a writer that uploads in parts, several in flight, straight from the memory that it is given."""
        key, objects = check_name(name), self._objects
        part = part_nbytes_for(nbytes, self._budget, objects, write_nbytes)
        return RemoteArchiveWriter(objects, key, self.location(name), part, self._budget, self._patience)

    def load_archive(self, name: str, read: ArchiveRead) -> int:
        """Read ranges in requests of bounded size, several in flight; each is verified and scattered as it comes."""
        key, scatter = check_name(name), read.from_memory()
        damaged: list[int] = []

        def fetch(spans: list[tuple[int, int]]) -> None:
            start, stop = spans[0][0], sum(spans[-1])
            data = self._get(key, start, stop - start)
            if len(data) < stop - start:
                raise CheckpointDamagedError(
                    f"{self.location(name)}: ends at byte {start + len(data)}, at least {read.fixed_nbytes} bytes "
                    "expected"
                )
            array = np.frombuffer(data, np.uint8)
            for position, nbytes in spans:
                block = scatter(array, start, position, nbytes)
                if block >= 0:
                    damaged.append(block)

        most = max(read.block_nbytes, self._budget.read_nbytes // read.block_nbytes * read.block_nbytes)
        requests = _requests(read.ranges.tolist(), most, self._budget.gap_nbytes)
        in_parallel(fetch, requests, min(self._budget.requests, len(requests)))
        return min(damaged, default=-1)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Return a small object, by one request; raises `StorageError`: ENOENT if missing, EFBIG above `limit`."""
        key = check_name(name)
        # Few are larger than this, and nobody can be made to hold the limit at once for nothing.
        first = min(limit + 1, _SMALL)
        data = bytes(self._get(key, 0, first))
        if len(data) == first <= limit:
            rest = limit + 1 - first
            data += self._get(key, first, rest)
        if len(data) > limit:
            raise StorageError(
                errno.EFBIG, f"{self.location(name)}: longer than the {limit} bytes that this file may have"
            )
        return data

    def read_range(self, name: str, position: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes; raises `CheckpointDamagedError` where the object ends before."""
        key = check_name(name)
        if nbytes == 0:
            return b""
        data = self._get(key, position, nbytes)
        if len(data) < nbytes:
            raise CheckpointDamagedError(
                f"{self.location(name)}: ends at byte {position + len(data)}, {position + nbytes} bytes expected"
            )
        return bytes(data)

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, None where there is none."""
        found = self._stat(check_name(name))
        return None if found is None else found.nbytes

    def list(self, directory: str = "") -> _Names:
        """Return the sorted names right below a directory, without temporaries; [] where there is none."""
        return [name for name in self._names(directory) if not name.startswith(_TEMPORARY)]

    def temporaries(self, directory: str = "") -> _Names:
        """Return the sorted names of the temporary objects right below a directory."""
        return [name for name in self._names(directory) if name.startswith(_TEMPORARY)]

    def delete(self, name: str, *, durable: bool = True) -> None:
        """Delete an object; one that is missing is no error."""
        self._delete([check_name(name)], name)

    def delete_tree(self, name: str) -> None:
        """Delete all below a directory, and give up the uploads to there."""
        for upload in self._unfinished(check_name(name) + "/"):
            self._abort(upload, name)
        self._delete(sorted(self._below(name)), name)
        self._remove_empty(name)

    def remove_directory(self, name: str) -> bool:
        """Return whether nothing is below a directory: then it is none, and goes where the store has directories."""
        if self._names(name):
            return False
        self._remove_empty(name)
        return True

    def touch(self, name: str) -> None:
        """Write a small object once more: that sets its time on every store."""
        data = self.read_bytes(name, _SMALL)
        self.write_bytes(name, data)

    def modified(self, name: str) -> float | None:
        """Return when an object, or the newest below a directory, was written; None where there is none."""
        found = self._stat(name) if check_name(name, allow_root=True) else None
        if found is not None:
            return found.modified
        return max((stat.modified for stat in self._below(name).values()), default=None)

    def exists(self, name: str) -> bool:
        """Return whether there is such an object, or anything below it."""
        return self.size(name) is not None or bool(self._names(name))

    def now(self) -> float:
        """Return the store's time: of its reply, or of a temporary object."""
        now = self._do("list", "", lambda objects, request: objects.now(request.left))
        if now is not None:
            return now
        key = self._temporary()
        self.write_bytes(key, b".")
        try:
            found = self._stat(key)
        finally:
            self.delete(key)
        if found is None:
            raise StorageError(errno.EIO, f"{self.location(key)} was written, but does not exist")
        return found.modified

    def unfinished(self) -> _Unfinished:
        """Return the archives to which an upload was begun, each with the time of that by the store's clock."""
        return [(upload.key, upload.began) for upload in self._unfinished("")]

    def abandon(self, name: str) -> None:
        """Abort the uploads to an archive."""
        key = check_name(name)
        for upload in self._unfinished(key):
            if upload.key == key:
                self._abort(upload, name)

    def beside(self) -> tuple[RemoteStorage, str] | None:
        """Return what the root's URL lies in and the root's name there; a bucket lies in nothing."""
        place, _, name = self._location.rpartition("/")
        if not name or place.endswith(("/", ":")):
            return None
        return RemoteStorage(place, self._options, self._budget, self._patience), name

    def location(self, name: str = "") -> str:
        """Return the URL of a name."""
        return join(self._location, check_name(name, allow_root=True))

    @property
    def endpoint(self) -> str:
        """Scheme, host and port of the store, as far as they are known."""
        opened = self._opened
        return "" if opened is None else opened[1].endpoint

    def _unfinished(self, prefix: str) -> tuple[Unfinished, ...]:
        """Return the uploads below a prefix; none, which is told once, where the store does not let us see them."""
        try:
            return self._do(
                "list the uploads to", "", lambda objects, request: objects.unfinished(prefix, request.left)
            )
        except StorageError as error:
            if error.errno not in (errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._tell(
                "%s: what uploads of dead jobs have left can't be found (%s): permit s3:ListBucketMultipartUploads, or "
                "give the bucket a rule that ends old uploads",
                self._location,
                error.strerror,
            )
            return ()

    def _can_create(self) -> bool:
        """Return whether the store decides who is first, found out once by a probe where that isn't known."""
        if self._atomic is None:
            objects = self._objects
            self._atomic = self._probe() if objects.needs_probe else objects.atomic_create
            if not self._atomic:
                self._tell(
                    "%s: this store can't decide which of two writers is first, so a checkpoint is published after a "
                    "look whether it is there: let only one job at a time write to this run (docs/storage.md)",
                    self._location,
                )
        return self._atomic

    def _probe(self) -> bool:
        """Create an object twice: a store that lets the second one pass, or does not know the request, decides nothing.

        Raises where the place can't be written to at all.
        """
        key = self._temporary()
        self.write_bytes(key, b"1")
        try:
            return not self._create(key, b"2")
        except StorageError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            _log.info("%s: the store does not support conditional writes: %s", self._location, error)
            return False
        finally:
            self.delete(key)

    @staticmethod
    def _tell(message: str, location: str, *arguments: object) -> None:
        """Warn, once in a process for each location."""
        with _told_lock:
            known = (message, location) in _told
            _told.add((message, location))
        if not known:
            _log.warning(message, location, *arguments)

    @staticmethod
    def _temporary() -> str:
        return f"{_TEMPORARY}clock.{secrets.token_hex(6)}"

    def _stat(self, key: str) -> Stat | None:
        try:
            return self._do("look up", key, lambda objects, request: objects.stat(key, request.left))
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def _names(self, directory: str) -> _Names:
        prefix = _prefix(directory)
        found = self._do("list", directory, lambda objects, request: objects.list(prefix, request.left))
        return sorted({*found.objects, *found.prefixes})

    def _below(self, directory: str) -> dict[str, Stat]:
        prefix = _prefix(directory)
        return self._do("list", directory, lambda objects, request: objects.below(prefix, request.left))

    def _abort(self, upload: Unfinished, name: str) -> None:
        self._ignore_missing(
            lambda: self._do("abort an upload to", name, lambda objects, request: objects.abort(upload, request.left))
        )

    def _delete(self, keys: _Names, name: str) -> None:
        most = self._objects.most_deleted
        for some in (keys[begin : begin + most] for begin in range(0, len(keys), most)):
            self._ignore_missing(
                lambda some=some: self._do(  # type: ignore[misc]
                    "delete", name, lambda objects, request: objects.delete(some, request.left)
                )
            )

    def _remove_empty(self, name: str) -> None:
        prefix = _prefix(name)
        self._ignore_missing(
            lambda: self._do(
                "remove the directory", name, lambda objects, request: objects.remove_empty(prefix, request.left)
            )
        )

    @staticmethod
    def _ignore_missing(call: Callable[[], object]) -> None:
        try:
            call()
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise


def _prefix(directory: str) -> str:
    return f"{directory}/" if check_name(directory, allow_root=True) else ""


def _requests(rows: list[list[int]], most: int, gap: int) -> list[list[tuple[int, int]]]:
    """Return ranges of (position, bytes), cut to at most `most` bytes, and joined over gaps where that fits."""
    requests: list[list[tuple[int, int]]] = []
    for start, length in rows:
        for position in range(start, start + length, most):
            span = position, min(most, start + length - position)
            last = requests[-1] if requests else None
            if last and position - sum(last[-1]) <= gap and sum(span) - last[0][0] <= most:
                last.append(span)
            else:
                requests.append([span])
    return requests
