"""Local and shared POSIX file systems: direct I/O for archives, durable small files, atomic publication."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.base import ArchiveWriter, Storage, check_name
from ckptengine.storage.direct import directly, reserve
from ckptengine.storage.disk import REQUEST_NBYTES, Disk
from ckptengine.storage.durable import DurableWrites, is_temporary, removed_on_failure, temporary_of
from ckptengine.storage.failure import NO_ROOM, checked, failure

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ALIGNMENT", "LOAD_THREADS", "LocalArchiveWriter", "LocalStorage"]

ALIGNMENT = 4096
"""What direct I/O wants of addresses, positions and lengths: the largest logical block size in common use."""
LOAD_THREADS = 8
"""Read requests in flight at most, whatever the number of cores: while a thread verifies and scatters what it has read,
the others keep the device busy. Their buffers, of `REQUEST_NBYTES` each, are all the memory that a load needs."""

_log = logging.getLogger("ckptengine")
_T = TypeVar("_T")
_Names = list[str]


class LocalStorage(Storage):
    """A directory that this process sees, on a local or shared file system.

    `root` need not exist until `create` or the first write. `direct_writes` and `direct_reads` count the
    calls for archives that went by `O_DIRECT`; `buffered_writes` and `buffered_reads` those where the file system
    refused. `disk` is for tests.
    """

    def __init__(self, root: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        self.direct_writes = self.buffered_writes = self.direct_reads = self.buffered_reads = 0
        self._writes = DurableWrites(str(self.root), disk or Disk())

    def create(self) -> None:
        """Make the root where it is missing, and check that it can be written to.

        Where there is no room, a root that holds something is still opened, to be read and to be cleaned up.
        """
        self._writes.make_directories(str(self.root))
        try:
            self._time_of_new_file()
        except StorageError as error:
            if error.errno not in NO_ROOM or not self.list():
                raise
            _log.warning("%s has no space left: it can be read, but saves will fail: %s", self.root, error)

    def check_writable(self) -> None:
        """Raise where the root, or what of its path is there, is no directory or may not be written to."""
        path = self.root
        while (found := self._status(str(path))) is None and path != path.parent:
            path = path.parent
        code = 0
        if found is not None and not stat.S_ISDIR(found.st_mode):
            code = errno.ENOTDIR
        elif not os.access(path, os.W_OK | os.X_OK):
            mount = checked("look up the file system of", str(path), lambda: os.statvfs(path))
            code = errno.EROFS if mount.f_flag & os.ST_RDONLY else errno.EACCES
        if code:
            what = "write to" if path == self.root else "make the directory"
            raise failure(what, str(self.root), OSError(code, os.strerror(code)))

    def make_directory(self, name: str) -> None:
        """Make a directory and those above it, each with its parent synced."""
        self._writes.make_directory(self._path(name))

    def write_bytes(self, name: str, data: Buffer, *, durable: bool = True) -> None:
        """Write a small file: temporary name, fsync, rename, fsync of the directory; no fsync without `durable`."""
        target = self._path(name)
        temporary = self._writes.write_temporary(target, data, durable)
        with removed_on_failure(temporary):
            checked("rename the finished file to", target, lambda: self._writes.disk.rename(temporary, target))
        if durable:
            self._writes.sync_directory(os.path.dirname(target))

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Write a small file unless the name is taken: by `link`, which never replaces."""
        target = self._path(name)
        temporary = self._writes.write_temporary(target, data)
        with removed_on_failure(temporary):
            won = checked("publish", target, lambda: self._writes.disk.publish(temporary, target))
        self._writes.sync_directory(os.path.dirname(target))
        return won

    def create_archive(self, name: str, nbytes: int, *, write_nbytes: int | None = None) -> LocalArchiveWriter:
        """Return a writer of a large file, with `O_DIRECT`, buffered where the file system refuses that.

        The space is reserved first, so that a full disk shows before anything is written.
        """
        return LocalArchiveWriter(self, self._writes, self._path(name), nbytes)

    def load_archive(self, name: str, read: ArchiveRead) -> int:
        """Read, verify and scatter with `O_DIRECT`, buffered where the file system refuses that."""
        path = self._path(name)
        with self._opened(path) as fd:
            found = checked("look up", path, lambda: os.fstat(fd)).st_size
            if found < read.fixed_nbytes:
                raise CheckpointDamagedError(f"{path}: {found} bytes long, at least {read.fixed_nbytes} expected")
            # A part that was scattered before a refusal is simply scattered again.
            damaged, direct = directly(fd, "read", path, lambda: read.from_file(fd, REQUEST_NBYTES, LOAD_THREADS))
        if direct:
            self.direct_reads += 1
        else:
            self.buffered_reads += 1
        return damaged

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Return a small file; raises `StorageError`: ENOENT if missing, EFBIG above `limit` bytes."""
        path = self._path(name)
        with self._opened(path) as fd:
            data = self._read(fd, 0, limit + 1, path)
        if len(data) > limit:
            raise StorageError(errno.EFBIG, f"{path}: longer than the {limit} bytes that this file may have")
        return data

    def read_range(self, name: str, position: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes; raises `CheckpointDamagedError` where the file ends before."""
        path = self._path(name)
        with self._opened(path) as fd:
            size = checked("look up", path, lambda: os.fstat(fd)).st_size
            # Asked before reading, so that a hostile length doesn't allocate.
            data = self._read(fd, position, nbytes, path) if 0 <= position <= size - nbytes else b""
        if nbytes < 0 or len(data) != nbytes:
            raise CheckpointDamagedError(
                f"{path}: {size} bytes long, bytes {position} to {position + nbytes} were expected"
            )
        return data

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where there is no such file."""
        found = self._status(self._path(name))
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def list(self, directory: str = "") -> _Names:
        """Return the sorted names right below a directory, without temporaries; [] where there is none."""
        return [name for name in self._names(directory) if not is_temporary(name)]

    def temporaries(self, directory: str = "") -> _Names:
        """Return the sorted names of the temporary files right below a directory."""
        return [name for name in self._names(directory) if is_temporary(name)]

    def delete(self, name: str, *, durable: bool = True) -> None:
        """Delete a file and sync its directory (not without `durable`); one that is missing is no error."""
        path = self._own_path("delete", name)
        try:
            self._writes.disk.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise failure("delete", path, error) from error
        if durable:
            self._writes.sync_removal(path)

    def delete_tree(self, name: str) -> None:
        """Delete a directory and all below it; one that is missing is no error."""
        path = self._own_path("delete", name, last=True)
        while True:
            try:
                self._writes.disk.remove_tree(path)
                break
            except FileNotFoundError:
                if not os.path.lexists(path):
                    return
                # Somebody else removes in there too: there is less than before.
            except OSError as error:
                raise failure("delete", path, error) from error
        self._writes.sync_removal(path)

    def remove_directory(self, name: str) -> bool:
        """Remove a directory if it is empty; return whether it is gone."""
        path = self._own_path("remove the directory", name, last=True)
        try:
            self._writes.disk.remove_directory(path)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise failure("remove the directory", path, error) from error
        self._writes.sync_removal(path)
        return True

    def touch(self, name: str) -> None:
        """Set a file's time of modification to the file system's present time."""
        path = self._path(name)
        checked("touch", path, lambda: os.utime(path))

    def modified(self, name: str) -> float | None:
        """Return when a file or directory was last modified, None where it is missing."""
        found = self._status(self._path(name, allow_root=True))
        return None if found is None else found.st_mtime

    def now(self) -> float:
        """Return the present time as the file system sees it: that of a file just written.

        On a disk without room it is that of the root, which is touched.
        """
        try:
            return self._time_of_new_file()
        except StorageError as error:
            if error.errno not in NO_ROOM:
                raise
        root = str(self.root)
        checked("touch", root, lambda: os.utime(root))
        return checked("look up", root, lambda: os.stat(root)).st_mtime

    def _time_of_new_file(self) -> float:
        """Write a file, which is removed again, and return when it was modified."""
        path = temporary_of(str(self.root / "clock"))
        fd = self._writes.create(path, str(self.root))
        try:
            # A byte, because a network server stamps a write with its own clock.
            checked("write", path, lambda: os.write(fd, b"."))
            checked("sync", path, lambda: self._writes.disk.sync(fd))
            return checked("look up", path, lambda: os.fstat(fd).st_mtime)
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(path)

    def is_linked(self, name: str) -> bool:
        """Return whether a symbolic link leads to a name, or is it; what is above the root does not count."""
        return self._link(name) is not None

    def beside(self) -> tuple[LocalStorage, str] | None:
        """Return the directory that the root lies in and the root's name there."""
        return (LocalStorage(self.root.parent, self._writes.disk), self.root.name) if self.root.name else None

    def location(self, name: str = "") -> str:
        """Return the full path of a name."""
        return self._path(name, allow_root=True)

    def _path(self, name: str, allow_root: bool = False) -> str:
        return str(self.root / check_name(name, allow_root=allow_root))

    def _own_path(self, operation: str, name: str, *, last: bool = False) -> str:
        """Return the path of what is to be deleted; raises `StorageError` (ELOOP) where a link leads out of the root.

        With `last` the name itself must not be a link either: what it points to would be meant.
        """
        path = self._path(name)
        link = self._link(name if last else os.path.dirname(name))
        if link is not None:
            raise StorageError(
                errno.ELOOP,
                f"cannot {operation} {path}: {link} is a symbolic link, which is not followed: what it points to may "
                "be another run's; remove the link by hand where it is not wanted",
            )
        return path

    def _link(self, name: str) -> str | None:
        """Return the first part of a name below the root that is a symbolic link."""
        path = str(self.root)
        for part in name.split("/") if name else ():
            path = f"{path}/{part}"
            try:
                found = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise failure("look up", path, error) from error
            if stat.S_ISLNK(found.st_mode):
                return path
        return None

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open a regular file for reading."""
        # Non-blocking, because a pipe in place of the file would otherwise hold up the reader for ever.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        fd = checked("open", path, lambda: os.open(path, flags))
        try:
            if not stat.S_ISREG(checked("look up", path, lambda: os.fstat(fd)).st_mode):
                raise StorageError(errno.EINVAL, f"cannot read {path}: it is not a regular file")
            yield fd
        finally:
            with contextlib.suppress(OSError):  # what was read is verified; a descriptor is freed whatever close says
                os.close(fd)

    @staticmethod
    def _read(fd: int, position: int, nbytes: int, path: str) -> bytes:
        """Return at most `nbytes` bytes, fewer only where the file ends."""
        parts: list[bytes] = []
        while nbytes > 0:
            try:
                part = os.pread(fd, min(nbytes, 64 << 20), position)
            except OSError as error:
                raise failure("read", path, error) from error
            if not part:
                break
            parts.append(part)
            position += len(part)
            nbytes -= len(part)
        return b"".join(parts)

    @staticmethod
    def _status(path: str) -> os.stat_result | None:
        try:
            return os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise failure("look up", path, error) from error

    def _names(self, directory: str) -> _Names:
        path = self._path(directory, allow_root=True)
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise failure("list", path, error) from error


class LocalArchiveWriter(ArchiveWriter):
    """A file under a temporary name until it is finished."""

    def __init__(self, storage: LocalStorage, writes: DurableWrites, target: str, nbytes: int) -> None:
        self._storage, self._writes, self._target = storage, writes, target
        self.where = target
        self._temporary = temporary_of(target)
        self._direct = self._sealed = True
        self._fd = self._writes.create(self._temporary, target)
        try:
            reserve(self._fd, nbytes, target)
        except BaseException:
            self.close()
            raise

    def write(self, address: int, nbytes: int, position: int) -> None:
        """Write memory to a position, several requests in flight."""
        if address % ALIGNMENT or nbytes % ALIGNMENT or position % ALIGNMENT:
            raise ValueError(
                f"{self._target}: address {address:#x}, length {nbytes} and position {position} must be multiples of "
                f"{ALIGNMENT}"
            )
        disk = self._writes.disk
        _, direct = directly(
            self._fd, "write", self._target, lambda: disk.write_memory(self._fd, address, nbytes, position)
        )
        self._direct = self._direct and direct

    def end(self, address: int, nbytes: int, position: int) -> None:
        """Write the last bytes, whole pages of them, and cut the file where they end; it stays writable."""
        self.write(address, -(-nbytes // ALIGNMENT) * ALIGNMENT, position)
        checked("shorten", self._target, lambda: os.ftruncate(self._fd, position + nbytes))
        self._sealed = False

    def finish(self) -> None:
        """Make the file read-only, sync, close, rename, sync the directory.

        No program that opens it for writing by mistake changes it then; deleting it asks the directory only.

        A failed sync fails the file and is never repeated: the kernel may have dropped the pages, and a second one
        would report success.
        """
        storage, target = self._storage, self._target
        with contextlib.suppress(OSError):  # not all file systems have permissions
            if self._sealed:
                os.fchmod(self._fd, os.fstat(self._fd).st_mode & 0o7777 & ~0o222)
        checked("sync", target, lambda: self._writes.disk.sync(self._fd))
        fd, self._fd = self._fd, -1
        # Network file systems report write errors at close.
        checked("close", target, lambda: os.close(fd))
        checked("rename the finished file to", target, lambda: self._writes.disk.rename(self._temporary, target))
        self._temporary = ""
        self._writes.sync_directory(os.path.dirname(target))
        if self._direct:
            storage.direct_writes += 1
        else:
            storage.buffered_writes += 1

    def close(self) -> None:
        """Close the file, and remove it where it was not finished."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # it is given up
                os.close(fd)
        temporary, self._temporary = self._temporary, ""
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
