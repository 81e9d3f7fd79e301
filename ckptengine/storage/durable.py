"""How files and directories come to last on a local disk: synced, and so is what they lie in."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckptengine.errors import StorageError
from ckptengine.storage.disk import Disk
from ckptengine.storage.failure import checked, failure

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DurableWrites", "is_temporary", "removed_on_failure", "temporary_of"]

_TEMPORARY = ".tmp-"
_OUR_TEMPORARY = re.compile(r"\.tmp-.+\.[0-9a-f]{12}")  # other names of this kind are somebody else's


class DurableWrites:
    """Makes files and directories at and below a root, an absolute path that need not exist. Paths are full ones.

    Raises `StorageError` naming operation and path.
    """

    def __init__(self, root: str, disk: Disk) -> None:
        self._root, self.disk = root, disk
        self._synced: set[str] = set()

    def make_directory(self, path: str) -> None:
        """Make a directory and those above it, each with its parent synced."""
        if not os.path.isdir(path):  # also one that was made, and that somebody has removed since
            self._forget(path)
        self.make_directories(path)

    def sync_removal(self, path: str) -> None:
        """Make it durable that a name is gone; who has removed the directory meanwhile sees to that."""
        try:
            self.sync_directory(os.path.dirname(path))
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise

    def sync_directory(self, path: str) -> None:
        """Make it durable which names a directory holds."""
        checked("sync the directory", path, lambda: self.disk.sync_directory(path))

    def make_directories(self, path: str) -> None:
        """Make a directory and those above it.

        From the root down each one's parent is synced once, whoever made it: another rank may have made it a
        moment ago and not have come to its own sync.
        """
        for last in (False, True):
            try:
                for directory in self._to_make(path):
                    self._make_directory(directory)
                return
            except StorageError as error:
                # Someone has removed one of them since it was made: all are made once more.
                if last or error.errno != errno.ENOENT:
                    raise
                self._forget(path)

    def _to_make(self, path: str) -> list[str]:
        """Return the directories, outermost first, that may be missing or whose parents may not be synced."""
        root, chain = self._root, []
        while path not in self._synced and (len(path) >= len(root) or not os.path.isdir(path)):
            chain.append(path)
            if path == "/":
                break
            path = os.path.dirname(path)
        return chain[::-1]

    def _make_directory(self, path: str) -> None:
        made = checked("make the directory", path, lambda: self.disk.make_directory(path))
        parent = os.path.dirname(path)
        try:
            # Names both: of a run's own directory, the parent alone would not tell which run it is about.
            told = f"{parent}, which holds {path}"
            checked("sync the directory", told, lambda: self.disk.sync_directory(parent))
        except StorageError as error:
            # The parent of a root that the user made may well be closed to us.
            if made or path != self._root or error.errno != errno.EACCES:
                raise
        self._synced.add(path)

    def write_temporary(self, target: str, data: Buffer, durable: bool = True) -> str:
        """Write a small file under a temporary name beside its target, synced if `durable`; return that name."""
        temporary = temporary_of(target)
        with removed_on_failure(temporary):
            fd = self.create(temporary, target)
            try:
                checked("write", target, lambda: self.disk.write(fd, memoryview(data).cast("B")))
                if durable:
                    checked("sync", target, lambda: self.disk.sync(fd))
            except BaseException:
                with contextlib.suppress(OSError):  # the error that led here says more
                    os.close(fd)
                raise
            checked("close", target, lambda: os.close(fd))
        return temporary

    def create(self, temporary: str, target: str) -> int:
        """Create a temporary file; its directory is made where it is missing."""
        directory = os.path.dirname(temporary)
        for last in (False, True):
            self.make_directories(directory)
            try:
                return self.disk.create(temporary)
            except FileNotFoundError as error:
                # Someone has removed the directory since: it is made once more.
                self._forget(directory)
                if last:
                    raise failure("create", target, error) from error
            except OSError as error:
                raise failure("create", target, error) from error
        raise AssertionError("unreachable")

    def _forget(self, directory: str) -> None:
        """Look again at a directory and those above it, down from the root, when they are made next."""
        parts = os.path.relpath(directory, self._root).split("/")
        for count in range(len(parts) + 1):
            self._synced.discard(os.path.normpath(os.path.join(self._root, *parts[:count])))


def temporary_of(target: str) -> str:
    """Return a name beside a file, which nobody else has, under which it is written."""
    directory, name = os.path.split(target)
    return f"{directory}/{_TEMPORARY}{name}.{secrets.token_hex(6)}"


def is_temporary(name: str) -> bool:
    """Return whether a name is one that `temporary_of` makes."""
    return _OUR_TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def removed_on_failure(temporary: str) -> Iterator[None]:
    """Remove a temporary file where what is done with it raises."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
