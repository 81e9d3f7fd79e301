"""A disk whose operations fail on demand, and the files that it was asked to sync."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptengine.storage.disk import Disk
from ckptengine.storage.local import LocalStorage

OPERATIONS = (
    "make_directory", "create", "write", "write_memory", "sync", "sync_directory", "rename", "publish", "unlink",
    "remove_tree", "remove_directory",
)  # fmt: skip


class FaultyDisk(Disk):
    """Fails as `fails` says, which is asked before each operation for an errno, given its name and number."""

    def __init__(self) -> None:
        self.fails: Callable[[str, int], int | None] = lambda name, number: None
        self.arguments: tuple[Any, ...] = ()  # of the operation that `fails` is asked about
        self.count = 0
        self.failed: list[str] = []
        self.synced: list[str] = []
        self._lock = threading.Lock()  # each operation has its number, whatever other threads do

    def fail_once(self, number: int, code: int = errno.EIO) -> None:
        """Fail the operation of a number from now on, counted from 1."""
        self.count = 0
        self.fails = lambda name, at: code if at == number else None

    def fail_always(self, *names: str, code: int = errno.EIO) -> None:
        """Fail every operation of these names from now on; none: all is well again."""
        self.fails = lambda name, at: code if name in names else None

    def _operation(self, name: str, arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            self.count += 1
            if name == "sync":
                self.synced.append(os.readlink(f"/proc/self/fd/{arguments[0]}"))
            self.arguments = arguments
            code = self.fails(name, self.count)
            if code is not None:
                self.failed.append(name)
        if code is not None:
            raise OSError(code, os.strerror(code))
        return getattr(Disk, name)(self, *arguments)


def _operation(name: str) -> Callable[..., Any]:
    return lambda disk, *arguments: disk._operation(name, arguments)


for _name in OPERATIONS:
    setattr(FaultyDisk, _name, _operation(_name))


def install(patch: pytest.MonkeyPatch) -> FaultyDisk:
    """Have all saves and Checkpointers that begin from now on use a faulty disk."""
    disk = FaultyDisk()
    for module in ("ckptengine.api", "ckptengine.tiers.places"):
        patch.setattr(f"{module}.open_storage", lambda path, options=None, timeout=None: LocalStorage(Path(path), disk))
    return disk
