"""Several storages read as one: each file from the fastest that has it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ckptengine.errors import StorageError
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.base import StorageView, check_name

__all__ = ["Overlay", "Reported"]

_T = TypeVar("_T")
_Names = list[str]


class Overlay(StorageView):
    """The union of `views`, the fastest first.

    What an attempt has written is the same wherever it lies, for its directory's name is its own.
    """

    def __init__(self, views: Sequence[StorageView]) -> None:
        self.views = tuple(views)
        self._where: dict[str, StorageView] = {}
        self._lock = threading.Lock()

    def load_archive(self, name: str, read: ArchiveRead) -> int:
        """Read, verify and scatter from the fastest storage that has the archive."""
        return self._holder(name).load_archive(name, read)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Return a small file from the fastest storage that has it."""
        return self._first(name, lambda view: view.read_bytes(name, limit))

    def read_range(self, name: str, position: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from the fastest storage that has the file."""
        return self._holder(name).read_range(name, position, nbytes)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file in the fastest storage that has it, None where none has."""
        found = self._find(name)
        return None if found is None else found.size(name)

    def list(self, directory: str = "") -> _Names:
        """Return the sorted names that any of the storages has right below a directory."""
        return sorted({name for view in self.views for name in view.list(directory)})

    def location(self, name: str = "") -> str:
        """Return the full path of a name in the fastest storage that has it, in the last one where none has."""
        found = self._find(name) if name else None
        if found is None and name:
            found = next((view for view in self.views if view.list(name)), None)
        return (found or self.views[-1]).location(name)

    def forget(self) -> None:
        """Look again where each file lies: something has been moved."""
        with self._lock:
            self._where.clear()

    def _find(self, name: str) -> StorageView | None:
        """Return the fastest storage that has a file; files do not move while they are read."""
        with self._lock:
            known = self._where.get(name)
        if known is not None:
            return known
        for view in self.views:
            if view.size(name) is not None:
                with self._lock:
                    self._where[name] = view
                return view
        return None

    def _holder(self, name: str) -> StorageView:
        found = self._find(name)
        if found is None:
            raise StorageError(errno.ENOENT, f"cannot read {self.location(name)}: {os.strerror(errno.ENOENT)}")
        return found

    def _first(self, name: str, call: Callable[[StorageView], _T]) -> _T:
        for view in self.views[:-1]:
            try:
                return call(view)
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    raise
        return call(self.views[-1])


class Reported(StorageView):
    """What other nodes have said lies on their disks: names, sizes, and the bytes of small files.

    `files` has for each name its size and, where they were sent, its bytes. For choosing a checkpoint, not for loading.
    """

    def __init__(self, files: Mapping[str, tuple[int, bytes | None]], where: str) -> None:
        self._files, self._where = dict(files), where

    def load_archive(self, name: str, read: ArchiveRead) -> int:
        """Raise: the bytes are not here."""
        raise self._absent(name)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Return a small file that was sent; raises `StorageError` (ENOENT) where none was."""
        data = self._files.get(check_name(name), (0, None))[1]
        if data is None:
            raise self._absent(name)
        return data

    def read_range(self, name: str, position: int, nbytes: int) -> bytes:
        """Raise: the bytes are not here."""
        raise self._absent(name)

    def size(self, name: str) -> int | None:
        """Return the bytes that a file has on its node, None where no node has it."""
        return self._files[name][0] if name in self._files else None

    def list(self, directory: str = "") -> _Names:
        """Return the sorted names right below a directory on any of the nodes."""
        start = f"{directory}/" if directory else ""
        return sorted({name[len(start) :].partition("/")[0] for name in self._files if name.startswith(start)})

    def location(self, name: str = "") -> str:
        """Return what messages call a file of another node."""
        return f"{self._where}/{name} on another node" if name else f"{self._where} on other nodes"

    def _absent(self, name: str) -> StorageError:
        return StorageError(errno.ENOENT, f"cannot read {self.location(name)} from here")
