"""The calls that change a disk, one method each, so that the crash tests can record and replay them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil

from ckptengine.counters import note_file, note_sync
from ckptengine.storage.system import rename_no_replace

__all__ = ["REFUSALS", "REQUEST_NBYTES", "WRITE_DEPTH", "Disk"]

REQUEST_NBYTES = 8 << 20
"""Bytes of one read or write request: enough that the cost of a call doesn't show."""
WRITE_DEPTH = 4
"""Write requests in flight: devices and network file systems need more than one to be busy all the time."""

REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
"""What file systems answer where they lack an operation."""


class Disk:
    """The file system as the kernel offers it; everything raises plain `OSError`."""

    def make_directory(self, path: str) -> bool:
        """Make a directory; return False where it is there already."""
        try:
            os.mkdir(path)
            return True
        except FileExistsError:
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
            return False

    def create(self, path: str) -> int:
        """Return the descriptor of a new, empty file."""
        note_file()
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview) -> None:
        """Write all bytes at the descriptor's position."""
        while data:
            data = data[os.write(fd, data) :]

    def write_memory(self, fd: int, address: int, nbytes: int, position: int) -> None:
        """Write memory to a position of a file, several requests in flight, without the GIL."""
        import ckptengine._native as _native

        _native.write(fd, address, nbytes, position, REQUEST_NBYTES, WRITE_DEPTH)

    def sync(self, fd: int) -> None:
        """Make a file's bytes durable."""
        note_sync()
        os.fsync(fd)

    def sync_directory(self, path: str) -> None:
        """Make the entries of a directory durable."""
        note_sync()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network and FUSE file systems can't sync directories: their entries are durable at once.
            if error.errno not in REFUSALS:
                raise
        finally:
            os.close(fd)

    def rename(self, source: str, target: str) -> None:
        """Rename a file over its target."""
        os.rename(source, target)

    def publish(self, source: str, target: str) -> bool:
        """Give a file its final name unless that is taken, and remove the old name.

        Returns whether the name was free.
        """
        try:
            os.link(source, target)
            won = True
        except FileExistsError:
            # A network file system may lose the reply to a link that it made: then the target is our file.
            won = os.path.samefile(source, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            # No hard links here, as on some FUSE and FAT file systems: one rename can do it as well.
            if rename_no_replace(source, target):
                return True
            won = False
        # The name is decided: a temporary one that stays is swept later.
        with contextlib.suppress(OSError):
            os.unlink(source)
        return won

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        os.unlink(path)

    def remove_tree(self, path: str) -> None:
        """Remove a directory and all below it; links are not followed."""
        shutil.rmtree(path)

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""
        os.rmdir(path)
