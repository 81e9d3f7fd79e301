"""The interface between checkpoints and the place where their bytes lie."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ckptengine.errors import StorageError
from ckptengine.storage.archive_read import ArchiveRead

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ArchiveWriter", "Storage", "StorageView", "check_name", "join"]

_Names = list[str]
_Unfinished = list[tuple[str, float]]


def check_name(name: str, *, allow_root: bool = False) -> str:
    """Return a name that lies within a storage: a relative POSIX path of plain parts.

    Names come from manifests too, and a hostile one must not lead out of the storage. Raises `StorageError`
    (EINVAL) for absolute names, empty parts, `.`, `..`, backslashes and NUL; the empty name is the storage's
    root and allowed with `allow_root` only.
    """
    if allow_root and not name:
        return name
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(
            errno.EINVAL, f"{name!r} is not a name within a storage: use a relative path without '.' and '..'"
        )
    return name


def join(*parts: str) -> str:
    """Return a name below a directory; empty parts (the storage's root) are left out."""
    return "/".join(part for part in parts if part)


class ArchiveWriter(ABC):
    """A large file on its way into a storage; a context manager, which leaves nothing behind unless it was finished."""

    where: str = "an archive"
    """The file's full path, for messages."""

    @abstractmethod
    def write(self, address: int, nbytes: int, position: int) -> None:
        """Write memory to a position of the file; positions follow each other. Releases the GIL.

        `address`, `nbytes` and `position` are multiples of 4096; the memory must not change meanwhile.
        """

    def end(self, address: int, nbytes: int, position: int) -> None:
        """Write the last bytes of a file that is no archive of ours: any number of them, and nothing comes after them.

        `address` and `position` are multiples of 4096; the memory goes on to the next multiple.
        """
        self.write(address, nbytes, position)

    @abstractmethod
    def finish(self) -> None:
        """Make the file durable under its name."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; what was not finished is removed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StorageView(ABC):
    """Files under relative POSIX names, to be read. Safe to use from several threads and processes at once.

    All failures are `StorageError`s with the system's `errno` that name file and operation.
    """

    @abstractmethod
    def load_archive(self, name: str, read: ArchiveRead) -> int:
        """Read ranges of an archive's fixed region, verify them block by block, and scatter them to memory.

        Returns the number of the first damaged block, or -1. Raises `CheckpointDamagedError` where the file is shorter
        than its fixed region.
        """

    @abstractmethod
    def read_bytes(self, name: str, limit: int) -> bytes:
        """Return a small file; raises `StorageError`: ENOENT if missing, EFBIG above `limit` bytes."""

    @abstractmethod
    def read_range(self, name: str, position: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes; raises `CheckpointDamagedError` where the file ends before."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where there is no such file."""

    @abstractmethod
    def list(self, directory: str = "") -> _Names:
        """Return the sorted names of the files and directories right below one; [] where there is none.

        Temporary files are left out.
        """

    @abstractmethod
    def location(self, name: str = "") -> str:
        """Return the full path of a name, for messages."""

    @property
    def endpoint(self) -> str:
        """Who is asked, where the location does not say it, for messages; nobody is asked for that."""
        return ""

    def beside(self) -> tuple[StorageView, str] | None:
        """Return the directory that the root lies in and the root's name there, for a root that may be a file.

        None where there is none, or the view is put together from several places.
        """
        return None

    def exists(self, name: str) -> bool:
        """Return whether there is such a file, or a directory with anything in it."""
        return self.size(name) is not None or bool(self.list(name))

    def is_linked(self, name: str) -> bool:
        """Return whether a symbolic link leads to a name, or is it: then what lies there may be somebody else's."""
        return False


class Storage(StorageView):
    """A `StorageView` that can be written to.

    What a method has written is durable when it returns, and appears under its name as a whole or not at all. Deleting
    follows no symbolic link below the root: it raises `StorageError` (ELOOP).
    """

    def beside(self) -> tuple[Storage, str] | None:
        """Return the directory that the root lies in and the root's name there, for a root that may be a file."""
        return None

    leaves_temporaries = True
    """Whether a writer of an archive that is killed leaves a temporary file beside it."""

    @abstractmethod
    def create(self) -> None:
        """Make the root where it is missing, and check that it can be written to."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raise where it is plain, without touching anything, that the root can't be made or written to."""

    def check_shared(self, ranks: int) -> None:
        """Raise `StorageError` where it is plain that so many ranks can't all see the place."""

    @abstractmethod
    def make_directory(self, name: str) -> None:
        """Make a directory and those above it; one that is there already is no error."""

    @abstractmethod
    def write_bytes(self, name: str, data: Buffer, *, durable: bool = True) -> None:
        """Write a small file, replacing one of the same name; without `durable` a crash may lose it."""

    @abstractmethod
    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Write a small file unless the name is taken, decided atomically among all writers.

        `data` must be nobody else's (it carries an id), for a storage may tell its writer by it. Returns whether the
        name was free.
        """

    @abstractmethod
    def create_archive(self, name: str, nbytes: int, *, write_nbytes: int | None = None) -> ArchiveWriter:
        """Return a writer of a large file of at least `nbytes`, whose room is reserved where that is possible.

        `write_nbytes` come with each `write`, None: all that there is.
        """

    @abstractmethod
    def temporaries(self, directory: str = "") -> _Names:
        """Return the sorted names of the temporary files right below a directory, in use or left behind."""

    @abstractmethod
    def delete(self, name: str, *, durable: bool = True) -> None:
        """Delete a file, without `durable` not yet for good; one that is missing is no error."""

    @abstractmethod
    def delete_tree(self, name: str) -> None:
        """Delete a directory and all below it; one that is missing is no error."""

    @abstractmethod
    def remove_directory(self, name: str) -> bool:
        """Remove a directory if it is empty; return whether it is gone."""

    @abstractmethod
    def touch(self, name: str) -> None:
        """Set a file's time of modification to the storage's present time."""

    @abstractmethod
    def modified(self, name: str) -> float | None:
        """Return when a file or directory was last modified, by the storage's clock; None if missing."""

    @abstractmethod
    def now(self) -> float:
        """Return the present time by the clock that `modified` uses, which may differ from this machine's."""

    def unfinished(self) -> _Unfinished:
        """Return the archives that were begun and appear nowhere else, each with when that was, by the storage's clock.

        Only stores have them that keep the parts of an upload; elsewhere they are `temporaries`.
        """
        return []

    def abandon(self, name: str) -> None:
        """Give up an archive that `unfinished` has returned, and free its bytes."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a file or directory."""
        return self.modified(name) is not None
