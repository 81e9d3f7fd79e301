"""Any file system of fsspec, by the calls that all of them have."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ckptengine.storage.objects import Listing, Objects, Stat, Unfinished, Upload
from ckptengine.storage.ranges import LARGE, RangeReads
from ckptengine.storage.ranges_cloud import ranges_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FsspecObjects"]

_T = TypeVar("_T")

# Whose `pipe_file(mode="create")` is one conditional request: Google's `ifGenerationMatch=0`, Azure's `If-None-Match`.
_ATOMIC = frozenset(("gs", "gcs", "abfs", "abfss", "az", "adl"))
# Where directories have to be made and removed, names are given by renaming, and a connection is lost for good.
_FILES = frozenset(("sftp", "ssh", "sshfs", "ftp", "ftps", "smb", "hdfs", "arrow_hdfs", "webhdfs", "webHDFS", "dbfs"))
# Whose connection takes one command at a time: ftplib's, and paramiko's, whose threads take each other's replies.
_ONE_AT_A_TIME = frozenset(("ftp", "ftps", "sftp", "ssh"))
_TIMES = "LastModified", "last_modified", "updated", "mtime", "modify", "modificationTime", "created"

# The dictionary of `memory://` is this process's, and its files share one position among all who read them.
_memory = threading.RLock()


class FsspecObjects(Objects):
    """Objects below a path of a file system. `make` opens the file system and returns it with the path."""

    def __init__(self, make: Callable[[], tuple[Any, str]], protocol: str, location: str) -> None:
        super().__init__()
        # In a chain the last one has the files.
        store = location.rpartition("::")[2].partition("://")[0]
        self._make, self._in_memory = make, store == "memory"
        self._one = threading.RLock() if store in _ONE_AT_A_TIME else None
        self._has_files = store in _FILES
        self.atomic_create = self._in_memory or protocol in _ATOMIC
        self.needs_probe = protocol in _ATOMIC
        self._opening = threading.Lock()
        self._opened: tuple[Any, str] | None = None
        self._made: set[str] = set()
        self._protocol = store
        self._ranges: RangeReads | None = None
        if self._in_memory:
            self._file_system()

    def _file_system(self) -> tuple[Any, str]:
        """Return the file system and what comes before a key in its paths."""
        with self._opening:
            if self._opened is None:
                fs, root = self._make()
                self._opened = fs, root if root in ("", "/") else f"{root.rstrip('/')}/"
                self._ranges = ranges_of(self._protocol, root.strip("/").partition("/")[0])
            return self._opened

    @property
    def _fs(self) -> Any:
        return self._file_system()[0]

    def _path(self, key: str) -> str:
        before = self._file_system()[1]
        return f"{before}{key}".rstrip("/") or before

    def renew(self, seen: int) -> bool:
        """Open the file system anew: whether its credentials differ can't be seen."""
        with self._renewing:
            if self.version == seen:
                self.version += 1
                self._opened = None
                # Who holds the old one may never come back.
                self._one = self._one and threading.RLock()
            return True

    def reconnect(self, seen: int) -> None:
        """Open the file system anew where its one connection may be the one that was lost."""
        if self._has_files:
            self.renew(seen)

    def _run(self, call: Callable[[], _T], seconds: float) -> _T:
        """Return what a call returns, within `seconds`: few of these file systems have a limit of their own."""
        if self._in_memory:
            with _memory:
                return call()
        results: list[_T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with self._alone():
                    results.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="ckptengine-request", daemon=True)
        thread.start()
        thread.join(seconds)
        if errors:
            raise errors[0]
        if not results:
            raise TimeoutError("no reply")
        return results[0]

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """Return a lock where the file system can't do two things at once."""
        if self._one is None or self._fs.async_impl:
            return contextlib.nullcontext()
        return self._one

    def _with_parents(self, path: str, write: Callable[[], _T]) -> _T:
        """Return what `write` returns, after the directories above the path were made where it has such."""
        parent = path.rpartition("/")[0]
        if self._has_files and parent not in self._made:
            self._fs.makedirs(parent, exist_ok=True)
            self._made.add(parent)
        try:
            return write()
        except FileNotFoundError:
            # It may have been removed by another process meanwhile, or be a store whose directories we don't know of.
            self._fs.makedirs(parent, exist_ok=True)
            return write()

    def put(self, key: str, data: Buffer, seconds: float) -> None:
        """Write an object, under another name first where that would show half of it."""
        body = bytes(data)

        def put() -> None:
            path = self._path(key)
            if not self._has_files:
                self._with_parents(path, lambda: self._fs.pipe_file(path, body))
                return
            parent, _, name = path.rpartition("/")
            temporary = f"{parent}/.tmp-{name}.{secrets.token_hex(6)}"
            self._with_parents(path, lambda: self._fs.pipe_file(temporary, body))
            try:
                self._fs.mv(temporary, path)
            except Exception:
                # Some can't replace by renaming.
                with contextlib.suppress(Exception):
                    self._fs.rm_file(path)
                self._fs.mv(temporary, path)

        self._run(put, seconds)

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """Write an object by `pipe_file(mode="create")`."""
        self._run(lambda: self._fs.pipe_file(self._path(key), data, mode="create"), seconds)

    def get(self, key: str, position: int, nbytes: int, seconds: float) -> bytes | memoryview:
        """Return bytes of an object: by `cat_file`, and large ranges through obstore where that reads the store."""
        if nbytes < LARGE or self._protocol not in _ATOMIC:
            return self._get(key, position, nbytes, seconds)
        fs, before = self._file_system()
        ranges = self._ranges
        if ranges is None or not fs.async_impl:
            return self._get(key, position, nbytes, seconds)
        prefix = before.strip("/").partition("/")[2]

        def here(left: float) -> memoryview | None:
            read = ranges.get(fs, f"{prefix}/" if prefix else "", key, position, nbytes)
            future = asyncio.run_coroutine_threadsafe(read, fs.loop)
            try:
                return future.result(left)
            except BaseException:
                future.cancel()
                raise

        return ranges.read(key, position, seconds, here, lambda left: self._get(key, position, nbytes, left))

    def _get(self, key: str, position: int, nbytes: int, seconds: float) -> bytes:
        def get() -> bytes:
            end = min(position + nbytes, self._stat(key).nbytes) if nbytes else 0
            if position >= end:
                return b""
            if not self._has_files:
                return bytes(self._fs.cat_file(self._path(key), start=position, end=end))
            # `cat_file` of some reads the whole file.
            with self._fs.open(self._path(key), "rb") as file:
                if hasattr(file, "readv"):  # paramiko: all of a range is asked for at once
                    return b"".join(file.readv([(position, end - position)]))
                file.seek(position)
                return bytes(file.read(end - position))

        return self._run(get, seconds)

    def stat(self, key: str, seconds: float) -> Stat:
        """Return size and time by `info`."""
        return self._run(lambda: self._stat(key), seconds)

    def _stat(self, key: str) -> Stat:
        self._fs.invalidate_cache()
        info = self._fs.info(self._path(key))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return Stat(int(info["size"] or 0), _time(info))

    def list(self, prefix: str, seconds: float) -> Listing:
        """Return what lies right below a prefix by `ls`."""

        def found() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                return list(self._fs.ls(self._path(prefix), detail=True))
            except (FileNotFoundError, NotADirectoryError):
                return []

        items = self._run(found, seconds)
        own = self._path(prefix).strip("/")
        names = [(item["name"].rstrip("/"), item["type"]) for item in items]
        below = [(name.rpartition("/")[2], kind) for name, kind in names if name.strip("/") != own]
        return Listing(
            tuple(sorted(name for name, kind in below if kind == "file")),
            tuple(sorted(name for name, kind in below if kind != "file")),
        )

    def below(self, prefix: str, seconds: float) -> dict[str, Stat]:
        """Return all objects below a prefix by `find`."""
        found = self._run(lambda: self._find(prefix), seconds)
        start = len(self._file_system()[1].strip("/"))
        start += 1 if start else 0
        return {
            name.strip("/")[start:]: Stat(int(info["size"] or 0), _time(info))
            for name, info in found.items()
            if info["type"] == "file"
        }

    def _find(self, prefix: str, withdirs: bool = False) -> dict[str, Any]:
        self._fs.invalidate_cache()
        try:
            return dict(self._fs.find(self._path(prefix), detail=True, withdirs=withdirs))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """Delete objects by `rm_file`."""
        for key in keys:
            self._run(lambda key=key: self._delete(key), seconds)  # type: ignore[misc]

    def _delete(self, key: str) -> None:
        try:
            self._fs.rm_file(self._path(key))
        except FileNotFoundError:
            pass
        except Exception:
            # Not all tell by their error that there was none.
            if self._fs.exists(self._path(key)):
                raise

    def remove_empty(self, prefix: str, seconds: float) -> None:
        """Remove a directory and those below it, the deepest first, where they are empty."""

        def remove() -> None:
            root = self._path(prefix.rstrip("/"))
            found = [name for name, info in self._find(prefix, withdirs=True).items() if info["type"] == "directory"]
            for name in [*sorted(found, reverse=True), root]:
                path = f"/{name.strip('/')}" if root.startswith("/") else name.strip("/")
                self._made.discard(path)
                with contextlib.suppress(OSError, NotImplementedError):
                    self._remove_directory(path)

        if self._has_files:
            self._run(remove, seconds)

    def _remove_directory(self, path: str) -> None:
        if self._fs.async_impl and hasattr(self._fs, "_rmdir"):
            # `rmdir` is not among the calls that fsspec makes of the asynchronous ones.
            from fsspec.asyn import sync

            sync(self._fs.loop, self._fs._rmdir, path)
        else:
            self._fs.rmdir(path)

    def upload(self, key: str, part_nbytes: int, seconds: float) -> Upload:
        """Open a file for writing, whose buffer is one part."""

        def opened() -> Any:
            path = self._path(key)
            # To files a block is what goes in one packet, to objects a part.
            block = {} if self._has_files else {"block_size": part_nbytes}
            file = self._with_parents(path, lambda: self._fs.open(path, "wb", **block))
            if hasattr(file, "set_pipelined"):  # paramiko: packets don't wait for each other's replies
                file.set_pipelined(True)
            return file

        return _File(self, self._run(opened, seconds), key)

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
        # A call that was given up may still look at what it was given.
        part = memory if self._objects._in_memory else bytes(memory)
        self._objects._run(lambda: self._file.write(part), seconds)

    def complete(self, seconds: float) -> None:
        self._objects._run(self._file.close, seconds)

    def abort(self, seconds: float) -> None:
        def discard() -> None:
            call = getattr(self._file, "discard", None)
            if call is not None:
                with contextlib.suppress(Exception):
                    call()
            if not self._end():
                self._file.close()

        try:
            self._objects._run(discard, seconds)
        finally:
            self._end()  # also where the store did not answer
        self._objects.delete([self._key], seconds)

    def _end(self) -> bool:
        """Have the file count as closed: else the garbage collector would upload what is there, however long it takes.

        Returns False for a file that only `close` closes.
        """
        try:
            self._file.closed = True
        except AttributeError:
            return False
        return True


def _time(info: dict[str, Any]) -> float:
    """Return when a file was written, by whatever name its file system tells it."""
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, str):
            value = _parsed(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            # WebHDFS tells milliseconds.
            return value / 1000 if name == "modificationTime" else float(value)
    return 0.0


def _parsed(text: str) -> datetime.datetime | None:
    """Return the time that a text says; `YYYYMMDDHHMMSS` is FTP's (RFC 3659), in UTC."""
    with contextlib.suppress(ValueError):
        if text[:14].isdigit() and len(text) >= 14:
            return datetime.datetime.strptime(text[:14], "%Y%m%d%H%M%S").replace(tzinfo=datetime.UTC)
        return datetime.datetime.fromisoformat(text)
    return None
