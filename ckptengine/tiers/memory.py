"""The memory tier: a directory of a tmpfs in which the arenas themselves are the archives."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.listing import (
    MAX_CLAIM_NBYTES,
    Entry,
    attempt_of,
    claim_name,
    claimed_generations,
    committed,
    read_manifest,
)
from ckptengine.catalog.listing import step_directories as steps_of
from ckptengine.errors import CheckpointDamagedError, CheckpointError, FormatVersionError, StorageError
from ckptengine.snapshot.arena import Arena
from ckptengine.snapshot.shared_arena import SharedArena, is_locked, remove_unused
from ckptengine.storage.base import join
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.open import local_path

__all__ = ["MemoryTier", "memory_root"]

_DEFAULT = "/dev/shm"
_ARENAS = "arenas"
_ARENA = re.compile(r"rank-\d{5,}-[a-z]")
_COUNT = 2
"""One holds the newest checkpoint while the other is filled."""
_NAMES = "abcdefgh"

_log = logging.getLogger("ckptengine")


def memory_root(run: str, memory: Literal[True] | str | os.PathLike[str]) -> str:
    """Return the directory of a run's memory tier: one for each user and run, below `/dev/shm` or `memory`.

    `run` is the run's location, `memory` True or a directory of a tmpfs. Raises `StorageError` where it is none.
    """
    base = os.path.realpath(_DEFAULT if memory is True else local_path(memory, "memory"))
    if not os.path.isdir(base):
        raise StorageError(errno.ENOENT, f"memory={base!r}: there is no such directory; give one on a tmpfs")
    kind = _file_system(base)
    if kind != "tmpfs":
        raise StorageError(
            errno.EINVAL,
            f"memory={base!r} is on {kind}, not on a tmpfs: what lies there would outlive a reboot, or is no memory; "
            "give a directory of a tmpfs, such as /dev/shm",
        )
    name = re.sub(r"[^A-Za-z0-9._-]", "-", run.rstrip("/").rpartition("/")[2])[:40] or "run"
    return f"{base}/ckptengine-{os.geteuid()}/{name}-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def _file_system(path: str) -> str:
    """Return the type of the file system that a directory is on (proc(5), mountinfo)."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        if head.split()[2] == wanted:
            return tail.split()[0]
    return "an unknown file system"


class MemoryTier:
    """What one rank has and sees of the memory tier of its node, whose directory is `root`.

    Everything in it is this user's alone, and gone after a reboot. `storage` reads it as any other run.
    """

    def __init__(self, root: str, rank: int) -> None:
        self.storage = LocalStorage(root)
        self._rank = rank
        self._arenas: list[SharedArena] = []
        self._kept: SharedArena | None = None
        self._lock = threading.RLock()  # a Checkpointer may be collected as garbage while a thread is in here
        self._short = False

    def open(self) -> None:
        """Make the directory; raises `StorageError` where it is not this user's alone."""
        for last in (False, False, True):
            try:
                self._make_directories()
                return
            except FileNotFoundError as error:  # a job that has ended has removed one of them meanwhile
                if last:
                    raise StorageError(error.errno, f"cannot make the directory {error.filename}") from error
            except StorageError:
                raise
            except OSError as error:
                message = f"cannot make the directory {error.filename}: {error.strerror}"
                raise StorageError(error.errno, message) from error

    @property
    def _directories(self) -> tuple[Path, Path, Path]:
        root = self.storage.root
        return root.parent, root, root / _ARENAS

    def _make_directories(self) -> None:
        for path in self._directories:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise StorageError(
                    errno.EPERM,
                    f"{path} does not belong to this user alone (owner, mode 0700): remove it, or leave memory= out",
                )

    def take(self, nbytes: int) -> SharedArena | None:
        """Return an arena of at least `nbytes` for the next image, or None where shared memory is short.

        It is the one that does not hold the newest checkpoint; what it held is not committed any more. The shortage is
        told once.
        """
        with self._lock:
            arena: SharedArena | None = None
            try:
                arena = min(self._open_arenas(), key=lambda one: (one is self._kept, self._order(one)))
                self._retract(arena)
                arena.reserve(nbytes)
                arena.begin(nbytes)
            except StorageError as error:
                with contextlib.suppress(StorageError):
                    if arena is not None and self._order(arena) is _NOTHING:
                        arena.empty()  # what is too little for an image here may be enough elsewhere
                if not self._short:
                    self._short = True
                    _log.warning("%s. Until then checkpoints are not kept in the memory tier", error)
                return None
            self._short = False
            return arena

    def kept(self, arena: SharedArena | None) -> None:
        """Note that the image in an arena is part of the newest committed checkpoint.

        Its manifest may still be on its way to this node.
        """
        with self._lock:
            self._kept = arena

    def prepare(self, nbytes: int, ready: Callable[[Arena], None] | None = None) -> None:
        """Have the arenas' memory there before it is needed, as far as nothing committed lies in it.

        `ready` is called with each of those.
        """
        with self._lock:
            try:
                for arena in self._open_arenas():
                    if self._order(arena) is _NOTHING:
                        self._retract(arena)
                        arena.reserve(nbytes)
                        if ready is not None:
                            ready(arena)
            except StorageError as error:
                _log.info("the memory tier can't be prepared in advance: %s", error)

    def _open_arenas(self) -> list[SharedArena]:
        """Return the arenas, opened where they are not: those that an ended process of this rank has left, or new."""
        self._arenas = [arena for arena in self._arenas if not arena.left]
        if len(self._arenas) < _COUNT:
            self.open()
        for name in _NAMES:
            if len(self._arenas) == _COUNT:
                break
            path = str(self.storage.root / _ARENAS / f"rank-{self._rank:05d}-{name}")
            if all(arena.path != path for arena in self._arenas):
                try:
                    self._arenas.append(SharedArena(path))
                except StorageError as error:
                    if error.errno != errno.EBUSY:
                        raise
        if len(self._arenas) < _COUNT:
            raise StorageError(
                errno.EBUSY,
                f"{self.storage.root / _ARENAS}: other processes have all arenas of rank {self._rank}: does the same "
                "run train twice on this machine?",
            )
        return self._arenas

    def _order(self, arena: SharedArena) -> tuple[int, int]:
        """Return the order of the committed checkpoint that lies in an arena, the lowest of all where none does.

        Raises `StorageError` where that can't be read: what may be committed is not overwritten.
        """
        for entry in reversed(committed(self.storage)):
            attempt = self._attempt(entry)
            if attempt is not None and self._is_in(arena, attempt_directory(entry.directory, attempt)):
                return entry.order
        return _NOTHING

    def _attempt(self, entry: Entry) -> str | None:
        """Return whose a manifest is, None where nobody can use it: it is damaged, or another rank has removed it."""
        try:
            return read_manifest(self.storage, entry).attempt
        except (CheckpointDamagedError, FormatVersionError):
            return None
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def _is_in(self, arena: SharedArena, data: str) -> bool:
        return any(arena.is_file(self.storage.location(join(data, name))) for name in self.storage.list(data))

    def _retract(self, arena: SharedArena) -> None:
        """Take back what lies in an arena: first the manifest, then the names of the data."""
        for _, directory in steps_of(self.storage):
            for name in self.storage.list(directory):
                if attempt_of(name) is not None and self._is_in(arena, join(directory, name)):
                    self._remove(directory, name)

    def _remove(self, directory: str, data: str) -> None:
        """Remove an attempt's manifests and its data; other ranks may be at the same."""
        attempt = attempt_of(data)
        for entry in committed(self.storage):
            if entry.directory == directory and self._attempt(entry) in (attempt, None):
                self.storage.delete(entry.manifest)
        for _ in range(2):
            try:
                self.storage.delete_tree(join(directory, data))
                break
            except StorageError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise
        self.storage.remove_directory(directory)

    def withdraw(self, directory: str, generation: int, attempt: str) -> None:
        """Take back another attempt's commit of a step that is saved again, in whose place this one's goes.

        For the first rank of a node, before the commit; the save before it failed where it is durable.
        """
        with contextlib.suppress(CheckpointError):  # else the commit says that the place is taken
            for entry in committed(self.storage):
                if (entry.directory, entry.generation) == (directory, generation):
                    other = self._attempt(entry)
                    if other not in (attempt, None):
                        self._remove(directory, f"data-{other}")

    def tidy(self, attempt: str) -> None:
        """Remove what an attempt, now committed, has replaced; also arenas that no process has and nothing lies in.

        For the first rank of a node. Other ranks may be at the next attempt already.
        """
        for _, directory in steps_of(self.storage):
            for name in self.storage.list(directory):
                other = attempt_of(name)
                if other is not None and other != attempt and not _follows(other, attempt):
                    self._remove(directory, name)
            self._remove_directory(directory)
        self._remove_arenas()

    def _remove_directory(self, directory: str) -> None:
        """Remove a step's directory unless there is data in it."""
        if not any(map(attempt_of, self.storage.list(directory))):
            for entry in committed(self.storage):
                if entry.directory == directory:
                    self.storage.delete(entry.manifest)
        self.storage.remove_directory(directory)

    def _remove_arenas(self) -> None:
        for path in self._arena_paths():
            if _ARENA.fullmatch(os.path.basename(path)):
                try:
                    remove_unused(path)
                except OSError as error:
                    raise StorageError(error.errno, f"cannot remove {path}: {error.strerror}") from error

    def note_claims(self, claims: dict[int, bytes]) -> bool:
        """Make the tier's claims of generations those of the run; return whether it held another run's.

        Then everything in it is removed: the run's directory has been deleted and begun anew. `claims` are the run's
        claim files by generation; where there are none, nothing can be said. The newest that both have tells: a job
        that goes on from what lies here alone claims the next generation before the earlier claims come there.
        """
        mine, stale = claimed_generations(self.storage), False
        if claims and mine:
            both = set(mine) & set(claims)
            stale = not both or claims[max(both)] != self.storage.read_bytes(claim_name(max(both)), MAX_CLAIM_NBYTES)
        if stale:
            self._clear(living=True)
        for generation, claim in claims.items():
            self.storage.put_if_absent(claim_name(generation), claim)
        return stale

    def left_behind(self) -> int | None:
        """Return the bytes of the arenas here; None where a living process has any of them."""
        arenas = self._arena_paths()
        if any(map(is_locked, arenas)):
            return None
        return sum(map(_occupied, arenas))

    def _arena_paths(self) -> list[str]:
        return [self.storage.location(join(_ARENAS, name)) for name in self.storage.list(_ARENAS)]

    def clear(self) -> None:
        """Remove everything but what other living processes have, such as a job that has taken the run over."""
        self._clear(living=False)

    def _clear(self, living: bool) -> None:
        for _, directory in steps_of(self.storage):
            for name in self.storage.list(directory):
                if attempt_of(name) is not None and (living or not self._is_held(join(directory, name))):
                    self._remove(directory, name)
            self._remove_directory(directory)
        self._remove_arenas()
        if living:
            self._remove_claims()
        self._remove_directories()

    def _remove_claims(self) -> None:
        for generation in claimed_generations(self.storage):
            self.storage.delete(claim_name(generation))

    def _remove_directories(self) -> None:
        """Remove claims and directories once no arena and no step lies here; the last rank of a node finds it so."""
        base, root, arenas = self._directories
        try:
            with contextlib.suppress(FileNotFoundError):
                arenas.rmdir()
        except OSError:
            return  # somebody has an arena
        if not steps_of(self.storage):
            self._remove_claims()
        for path in (root, base):
            with contextlib.suppress(OSError):
                path.rmdir()

    def _is_held(self, data: str) -> bool:
        return any(is_locked(self.storage.location(join(data, name))) for name in self.storage.list(data))

    def close(self, remove: bool) -> None:
        """Give the arenas back; with `remove` also what lies in them: for a job that ends as planned."""
        with self._lock:
            for arena in self._arenas:
                if remove:
                    self._retract(arena)
                    arena.remove()
                else:
                    arena.close()
            self._arenas, self._kept = [], None
            if remove:
                self._remove_directories()

    def abandon(self) -> None:
        """Forget the arenas, in a forked process: they are the parent's."""
        self._lock = threading.RLock()
        for arena in self._arenas:
            arena.abandon()
        self._arenas, self._kept = [], None


_NOTHING = (-1, -1)


def _follows(other: str, attempt: str) -> bool:
    """Return whether an attempt is a later one of the same series; see `Planner.next_attempt`."""
    series, _, number = attempt.rpartition("-")
    other_series, _, other_number = other.rpartition("-")
    return series == other_series and other_number.isdigit() and int(other_number) > int(number)


def _occupied(path: str) -> int:
    """Return the bytes that a file occupies, 0 where it has just been removed."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(error.errno, f"cannot look up {path}: {error.strerror}") from error
