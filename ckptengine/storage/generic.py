"""Any file system of fsspec, by the calls that all of them have."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptengine.storage.objects import Listing, Objects, Stat, Unfinished, Upload

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FsspecObjects"]

# Whose `pipe_file(mode="create")` is one conditional request: Google's `ifGenerationMatch=0`, Azure's `If-None-Match`.
_ATOMIC = frozenset(("gs", "gcs", "abfs", "abfss", "az", "adl"))
_TIMES = "LastModified", "last_modified", "updated", "mtime", "created"

# The dictionary of `memory://` is this process's, and its files share one position among all who read them.
_memory = threading.RLock()


class FsspecObjects(Objects):
    """Objects below a path of a file system. `fs` is an `fsspec.AbstractFileSystem`, `protocol` the URL's."""

    def __init__(self, fs: Any, root: str, protocol: str) -> None:
        self._fs, self._root = fs, root.rstrip("/")
        self._guard = _memory if protocol == "memory" else contextlib.nullcontext()
        self.atomic_create = protocol == "memory" or protocol in _ATOMIC
        self.needs_probe = protocol in _ATOMIC

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    def put(self, key: str, data: Buffer, seconds: float) -> None:
        """Write an object."""
        with self._guard:
            self._fs.pipe_file(self._path(key), bytes(data))

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """Write an object by `pipe_file(mode="create")`."""
        with self._guard:
            self._fs.pipe_file(self._path(key), data, mode="create")

    def get(self, key: str, position: int, nbytes: int, seconds: float) -> bytes:
        """Return bytes of an object by `cat_file`."""
        with self._guard:
            if nbytes == 0 or position >= self.stat(key, seconds).nbytes:
                return b""
            data = bytes(self._fs.cat_file(self._path(key), start=position, end=position + nbytes))
        return data

    def stat(self, key: str, seconds: float) -> Stat:
        """Return size and time by `info`."""
        with self._guard:
            self._fs.invalidate_cache()
            info = self._fs.info(self._path(key))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return Stat(int(info["size"] or 0), _time(info))

    def list(self, prefix: str, seconds: float) -> Listing:
        """Return what lies right below a prefix by `ls`."""
        with self._guard:
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._path(prefix), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return Listing((), ())
        own = self._path(prefix).strip("/")
        names = [(item["name"].rstrip("/"), item["type"]) for item in found]
        below = [(name.rpartition("/")[2], kind) for name, kind in names if name.strip("/") != own]
        return Listing(
            tuple(sorted(name for name, kind in below if kind == "file")),
            tuple(sorted(name for name, kind in below if kind != "file")),
        )

    def below(self, prefix: str, seconds: float) -> dict[str, Stat]:
        """Return all objects below a prefix by `find`."""
        with self._guard:
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path(prefix), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        start = len(self._root.strip("/")) + 1 if self._root.strip("/") else 0
        return {
            name.strip("/")[start:]: Stat(int(info["size"] or 0), _time(info))
            for name, info in found.items()
            if info["type"] == "file"
        }

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """Delete objects by `rm_file`."""
        for key in keys:
            with self._guard, contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(key))

    def upload(self, key: str, part_nbytes: int, seconds: float) -> Upload:
        """Open a file for writing, whose buffer is one part."""
        with self._guard:
            return _File(self, self._fs.open(self._path(key), "wb", block_size=part_nbytes), key)

    def unfinished(self, prefix: str, seconds: float) -> tuple[Unfinished, ...]:
        """Return nothing: fsspec has no call for them."""
        return ()

    def abort(self, unfinished: Unfinished, seconds: float) -> None:
        """There are none."""

    def now(self, seconds: float) -> float | None:
        """Return None: only a newly written object tells."""
        return None


class _File(Upload):
    """A file object of fsspec: it copies what it is given into its buffer, and sends that when it is full."""

    in_order = True

    def __init__(self, objects: FsspecObjects, file: Any, key: str) -> None:
        self._objects, self._file, self._key = objects, file, key

    def send(self, number: int, memory: memoryview, seconds: float) -> None:
        with self._objects._guard:
            self._file.write(memory)

    def complete(self, seconds: float) -> None:
        with self._objects._guard:
            self._file.close()

    def abort(self, seconds: float) -> None:
        with self._objects._guard:
            discard = getattr(self._file, "discard", None)
            if discard is not None:
                with contextlib.suppress(Exception):
                    discard()
            # Closing would upload what is there.
            self._file.closed = True
            with contextlib.suppress(FileNotFoundError):
                self._objects.delete([self._key], seconds)


def _time(info: dict[str, Any]) -> float:
    """Return when a file was written, by whatever name its file system tells it."""
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
