"""The disk that is measured: room, syncing, forgetting cached pages, counting files."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Give a new folder on the disk to measure, and remove it whatever happens."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="bench-")).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_room(folder: Path, nbytes: int) -> None:
    """Raise `OSError` (ENOSPC) where the disk has fewer free bytes than the checkpoints will take."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"{folder} has {free:,} bytes free, and the checkpoints take {nbytes:,}")


def sync_tree(path: Path) -> None:
    """Make a file, or all files and directories below a path, durable, and the path's own entry with it."""
    for entry in (*path.rglob("*"), path, path.parent):
        fd = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_directories(path: Path) -> None:
    """Make the entries of a directory, and its own, durable; for those who sync their files but not these."""
    for directory in (path, path.parent):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def drop_cache(path: Path) -> None:
    """Write back and forget the cached pages of all files below a path."""
    for file in path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def count_files(path: Path, pause: float = 0.05, tries: int = 100) -> int:
    """Return the number of files below a path, once none has come or gone for `pause` seconds.

    A save may be durable while what it worked with is still being cleared away (a lease, temporary files). Raises
    `TimeoutError` where files keep coming and going over that many tries.
    """
    found: set[Path] | None = None
    for _ in range(tries):
        before, found = found, {file for file in path.rglob("*") if file.is_file()}
        if found == before:
            return len(found)
        time.sleep(pause)
    raise TimeoutError(f"{path}: files kept coming and going for {pause * tries:g} s")


def remove(path: Path) -> None:
    """Remove a checkpoint and let the disk finish what it has to write, so that the next timing starts at rest."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
