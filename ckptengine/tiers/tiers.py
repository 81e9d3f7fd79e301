"""The places where a run's checkpoints lie: shared memory, the local disk, and its own place, the home."""

from __future__ import annotations

import atexit
import base64
import contextlib
import errno
import json
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.lease import LEASE_SECONDS
from ckptengine.catalog.listing import (
    MAX_CLAIM_NBYTES,
    Entry,
    claim_name,
    claimed_generations,
    newest,
    read_manifest,
)
from ckptengine.catalog.manifest import Manifest
from ckptengine.catalog.receipt import StorageStore
from ckptengine.catalog.retention import remove_leftovers, retain
from ckptengine.comm.agree import gather, share
from ckptengine.comm.base import Communicator
from ckptengine.comm.site import Site, find_sites
from ckptengine.errors import CheckpointError, SaveFailedError, StorageError
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.save.job import Target
from ckptengine.snapshot.shared_arena import SharedArena
from ckptengine.storage.base import Storage, StorageView, join
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.open import open_storage
from ckptengine.tiers.copy import check_same_run, copy_commit
from ckptengine.tiers.inventory import Inventory, take_inventory
from ckptengine.tiers.memory import MemoryTier, memory_root
from ckptengine.tiers.mover import Load, Mover, carry
from ckptengine.tiers.overlay import Overlay
from ckptengine.tiers.pace import Pace
from ckptengine.tiers.progress import shown

__all__ = ["Keep", "Tiers"]

_MESSAGES = re.compile(r"moves-[0-9a-f]{16}")

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class Keep:
    """Which committed checkpoints a tier keeps: the newest `last` (None: all), and multiples of `every` steps."""

    last: int | None
    every: int | None


class Tiers:
    """What one rank knows of the places of its run; methods marked "all ranks" are called by all, in one order.

    `first` is where saves commit: the local tier, or the home where there is none. `home` is the run's own place, which
    all ranks see. Raises `ValueError` for a `keep_last` that names a tier which is not there.
    """

    def __init__(
        self,
        run: str,
        comm: Communicator,
        timeout: float,
        *,
        local: str | os.PathLike[str] | None,
        memory: bool | str | os.PathLike[str],
        keep_last: int | Mapping[str, int] | None,
        keep_every: int | None,
        upload_bytes_per_second: float | None,
        storage_options: Mapping[str, Any] | None,
    ) -> None:
        self._comm, self._timeout = comm, timeout
        self.home = open_storage(run, storage_options)
        self.local = None if local is None else _local(local)
        self.first: Storage = self.local or self.home
        protocol = run.partition("://")[0] if "://" in run else "run"
        self._names = {"memory"} if memory else set()
        self._names |= {"local", protocol} if local is not None else {protocol}
        self._keep = {name: Keep(_last(keep_last, name, self._names), keep_every) for name in self._names}
        self._home_keep, self._first_keep = self._keep[protocol], self._keep["local" if local is not None else protocol]
        self._pace = None if upload_bytes_per_second is None else Pace(upload_bytes_per_second)
        root = None if not memory else memory_root(self.home.location(), True if memory is True else memory)
        self.memory = None if root is None else MemoryTier(root, comm.rank)
        self._site: Site | None = None
        self._memory_site: Site | None = None
        self._inventory = Inventory()
        self._mover: Mover | None = None
        self._messages: str | None = None
        self._claimed = False
        self._cleaning = threading.Lock()  # after a commit and after a move, which must not meet in one directory
        self.uploaded: int | None = None
        """On rank 0: the newest step that this life has brought home from a nearer tier."""

    @property
    def _near(self) -> list[tuple[Storage, Site]]:
        """The tiers before the home, the fastest first."""
        found: list[tuple[Storage, Site]] = []
        if self.memory is not None and self._memory_site is not None:
            found.append((self.memory.storage, self._memory_site))
        if self.local is not None and self._site is not None:
            found.append((self.local, self._site))
        return found

    def open(self, token: str) -> int | None:
        """Make the near tiers ready, and see who shares them; all ranks. `token` is this life's, 16 hex digits.

        Returns on rank 0 the newest step that it sees in any tier, where there are near ones.
        """
        if self.local is None and self.memory is None:
            return None
        error: Exception | None = None
        try:
            if self.local is not None:
                self.local.create()
            if self.memory is not None:
                self.memory.open()
        except Exception as problem:
            error = problem
        doing = "opening the tiers"
        gather(self._comm, b"", error, self._timeout, doing)
        storages = [self.memory.storage] if self.memory is not None else []
        storages += [self.local] if self.local is not None else []
        sites = find_sites(storages, self._comm, token[:12], self._timeout)
        if self.memory is not None:
            self._memory_site = sites[0]
        if self.local is not None:
            self._site = sites[-1]
        found = self._compare_claims(doing)
        store = self._comm.store()
        if store is None:
            self._messages = f"moves-{token}"
            store = StorageStore(self.home, self._messages)
            if self._comm.rank == 0:
                self._sweep_messages()
        source = Overlay([storage for storage, _ in self._near])
        self._mover = Mover(source, self.home, self._comm, store, token, self._came_home, self._pace)
        _living.add(self)
        return found

    def _compare_claims(self, doing: str) -> int | None:
        """Tell a tier of another run by its claims; what lies in memory of one is removed."""
        claims, error = b"{}", None
        try:
            if self._comm.rank == 0:
                claims = _packed_claims(self.home)
        except CheckpointError as problem:
            error = problem
        claims = share(self._comm, claims if self._comm.rank == 0 else None, error, self._timeout, doing)
        try:
            leads = self._memory_site is not None and self._memory_site.leads
            if self.memory is not None and leads and self.memory.note_claims(_unpacked_claims(claims)):
                _log.warning(
                    "%s held checkpoints of an earlier run at this place, which were removed",
                    self.memory.storage.location(),
                )
            if self.local is not None and self._site is not None and self._site.leads:
                check_same_run(self.home, self.local)
                for generation, claim in _unpacked_claims(claims).items():
                    if self.local.size(claim_name(generation)) is None:
                        self.local.put_if_absent(claim_name(generation), claim)
                if self._site.shared:
                    self._tell(remove_leftovers(self.local))
            found = self.newest() if self._comm.rank == 0 else None
        except CheckpointError as problem:
            found, error = None, problem
        gather(self._comm, b"", error, self._timeout, doing)
        return found

    def newest(self) -> int | None:
        """Return the newest step that rank 0 sees in any tier, None where there is none."""
        found = newest(Overlay([*(storage for storage, _ in self._near), self.home]))
        return None if found is None else found.step

    def claim(self, parent: tuple[int, int] | None) -> int:
        """Claim the next generation in all places, on rank 0; a home that can't be reached gets its claim later."""
        near = [storage for storage, _ in self._near]
        try:
            return claim_generation(self.home, parent, near)
        except StorageError as error:
            if self.local is None:
                raise
            _log.warning("%s: not reached, the run goes on in %s: %s", self.home.location(), self.local.root, error)
            return claim_generation(self.local, parent, [storage for storage in near if storage is not self.local])

    def target(self, target: Target) -> Target:
        """Return where a save that goes to the first tier is committed in memory; for `Saver`."""
        assert self.memory is not None
        return replace(
            target,
            storage=self.memory.storage,
            site=self._memory_site,
            meeting=self.home,
            committed=lambda _, attempt: self._kept(attempt),
        )

    def take(self, nbytes: int) -> SharedArena | None:
        """Return an arena in shared memory; see `MemoryTier.take`."""
        return None if self.memory is None else self.memory.take(nbytes)

    def prepare(self, nbytes: int) -> None:
        """Have the arenas in shared memory there before they are needed."""
        if self.memory is not None:
            self.memory.prepare(nbytes)

    def abandon(self) -> None:
        """Forget the arenas, in a forked process."""
        if self.memory is not None:
            self.memory.abandon()

    @property
    def site(self) -> Site | None:
        """The ranks that see the first tier as this one does, None: all."""
        return self._site

    def _kept(self, attempt: str) -> None:
        """Remove from this node's memory what the newest commit there has replaced."""
        assert self.memory is not None
        self._copy_claims(self.memory.storage)
        self.memory.tidy(attempt)

    def committed(self, generation: int, step: int, directory: str) -> None:
        """After a commit in the first tier, on the first rank of each site: have it moved on, delete what may go."""
        if self._mover is not None and self.local is not None and self._comm.rank == 0:
            manifest = read_manifest(self.local, Entry(step, generation, directory))
            holder = {record.name: rank for rank, record in enumerate(manifest.archives)}
            self._mover.offer(Load(directory, manifest, holder | {manifest.layout.name: 0}))
        if self.local is not None:
            self._copy_claims(self.local)
        self._retain(self.first, self._first_keep)

    def _copy_claims(self, storage: Storage) -> None:
        """Give a tier of this node the run's claims, once in a life: by them the next one knows whose it is."""
        if self._claimed or self._comm.rank == 0:  # rank 0 has claimed there
            return
        with contextlib.suppress(CheckpointError):
            for generation, claim in _claims(self.home).items():
                storage.put_if_absent(claim_name(generation), claim)
            self._claimed = True

    def _came_home(self, load: Load) -> None:
        self.uploaded = load.manifest.step
        try:
            self._retain(self.home, self._home_keep)
            if self.local is not None:
                self._retain(self.local, self._first_keep, load.manifest.attempt)
        except CheckpointError as error:
            _log.warning("%s: cleaning up failed: %s", self.home.location(), error)

    def _retain(self, storage: Storage, keep: Keep, moved: str = "") -> None:
        """Delete what may go; not what is still to be moved, of which the attempt `moved` is none any more."""
        with self._cleaning:
            self._tell(remove_leftovers(storage))
            if keep.last is not None:
                protected = set() if self._mover is None else self._mover.protected
                self._tell(retain(storage, keep.last, keep.every, protected - {moved}))

    def _tell(self, problems: list[str]) -> None:
        for problem in problems:
            _log.warning("%s: %s", self.home.location(), problem)

    def views(self) -> list[StorageView]:
        """Return where to look for a checkpoint: all tiers, then without the fastest, and so on; all ranks."""
        near = [storage for storage, _ in self._near]
        if not near:
            return [self.home]
        self._inventory = take_inventory(self._near, self._comm, self._timeout)
        reported = [self._inventory.reported] if self._inventory.reported is not None else []
        return [Overlay([*near[number:], self.home, *reported]) for number in range(len(near))] + [self.home]

    def bring(self, checkpoint: Checkpoint) -> None:
        """Bring a checkpoint home that only single nodes have, so that every rank can read all of it; all ranks."""
        if all(site.shared for _, site in self._near):
            return
        doing = f"bringing {checkpoint.directory} to {self.home.location()}"
        value, error = b"", None
        if self._comm.rank == 0:
            try:
                entry = _entry(checkpoint)
                shared = [storage for storage, site in self._near if site.shared]
                if all(storage.size(entry.manifest) is None for storage in (*shared, self.home)):
                    value = self._load(checkpoint.directory, checkpoint.manifest).encode()
            except Exception as problem:
                error = problem
        message = share(self._comm, value if self._comm.rank == 0 else None, error, self._timeout, doing)
        if not message:
            return
        load = Load.decode(message)
        near = Overlay([storage for storage, _ in self._near])
        try:
            carry(load, near, self.home, self._comm.rank)
        except CheckpointError as problem:
            error = problem
        gather(self._comm, b"", error, self._timeout, doing)
        if self._comm.rank == 0:
            try:
                copy_commit(checkpoint.storage, self.home, load.directory, load.manifest)
            except CheckpointError as problem:
                error = problem
        share(self._comm, b"" if self._comm.rank == 0 else None, error, self._timeout, doing)
        if isinstance(checkpoint.storage, Overlay):
            checkpoint.storage.forget()

    def _load(self, directory: str, manifest: Manifest) -> Load:
        """Return how the ranks share the work of bringing a checkpoint of an earlier life home."""
        data, holder = attempt_directory(directory, manifest.attempt), {}
        for number, record in enumerate((*manifest.archives, manifest.layout)):
            name = join(data, record.name)
            site = next((site for storage, site in self._near if storage.size(name) is not None), None)
            if site is not None:
                holder[record.name] = site.ranks[number % len(site.ranks)]
            else:
                holder[record.name] = self._inventory.holder.get(name, 0)
        return Load(directory, manifest, holder)

    def restored(self, generation: int, step: int) -> None:
        """After a restore, on rank 0: have what was restored moved home, where it is not there yet."""
        if self._mover is None or self._comm.rank != 0:
            return
        try:
            near = Overlay([storage for storage, _ in self._near])
            entry = Entry(step, generation, f"step-{step:08d}")
            if near.size(entry.manifest) is None:
                return
            if self.home.size(entry.manifest) is None:
                if not self.home.list():
                    _log.warning(
                        "%s is empty, and step %d was found in %s: the run goes on there. To begin anew, remove both",
                        self.home.location(),
                        step,
                        near.location(),
                    )
                self._mover.offer(self._load(entry.directory, read_manifest(near, entry)))
        except CheckpointError as error:
            _log.warning("step %d is not brought to %s: %s", step, self.home.location(), error)

    def flush(self, timeout: float) -> None:
        """Wait until the newest checkpoint has come home; all ranks, and rank 0 tells the others how it goes.

        Gives up `timeout` seconds after rank 0 has last moved a byte or heard of another rank. Raises `SaveFailedError`
        on all ranks saying where the checkpoint is and what keeps it there.
        """
        mover = self._mover
        if mover is None:
            return
        began = time.monotonic()
        waiting = mover.pending() if self._comm.rank == 0 else None
        what, total = "", 0
        if waiting is not None:
            what = f"step {waiting.manifest.step} to {self.home.location()}"
            total = waiting.nbytes // self._comm.world_size
        with shown(what, total) if waiting is not None else contextlib.nullcontext(lambda done: None) as show:
            word = b""
            while not word:
                error: Exception | None = None
                if self._comm.rank == 0:
                    word = b"." if mover.settle(_SLICE_SECONDS, show) else b""
                    still, problem = mover.still(began)
                    if not word and still > timeout and waiting is not None:
                        error = SaveFailedError(
                            f"step {waiting.manifest.step} is durable in {self.first.location()}, but is not in "
                            f"{self.home.location()}: {problem}. Started again with the same tiers, the job brings it "
                            "there"
                        )
                mine = word if self._comm.rank == 0 else None
                word = share(self._comm, mine, error, timeout + 2 * _SLICE_SECONDS, "waiting for uploads")

    def close(self, *, done: bool) -> None:
        """End the moving, and give the memory back. `done`: the job has ended well; then nothing stays in memory.

        Does not wait for uploads: `flush` does.
        """
        _living.discard(self)
        mover, self._mover = self._mover, None
        if mover is not None:
            if done:
                mover.close(self._timeout)
            else:
                mover.stop()
        if self._messages is not None and self._comm.rank == 0 and done:
            with contextlib.suppress(CheckpointError):
                self.home.delete_tree(self._messages)
        if self.memory is not None:
            self.memory.close(remove=done)
            if done and self._memory_site is not None and self._memory_site.leads:
                self.memory.clear()

    def _sweep_messages(self) -> None:
        """Remove what jobs without a key-value store have left of their messages."""
        for name in filter(_MESSAGES.fullmatch, self.home.list()):
            modified = self.home.modified(name)
            if name != self._messages and modified is not None and self.home.now() - modified > LEASE_SECONDS:
                self.home.delete_tree(name)


_SLICE_SECONDS = 5.0
"""How often rank 0 tells the others, at the end of a job, that it still waits for uploads."""


def _local(local: str | os.PathLike[str]) -> LocalStorage:
    path = os.fspath(local)
    if "://" in path:
        raise StorageError(errno.EINVAL, f"local={path!r}: the local tier is a directory, not a URL")
    return LocalStorage(path)


def _last(keep_last: int | Mapping[str, int] | None, name: str, names: set[str]) -> int | None:
    """Return how many checkpoints a tier keeps; None for all."""
    if isinstance(keep_last, Mapping):
        unknown = sorted(set(keep_last) - names)
        if unknown:
            raise ValueError(f"keep_last names {', '.join(unknown)}: this run has {', '.join(sorted(names))}")
        last = keep_last.get(name)
    else:
        last = keep_last
    if last is not None and last < 1:
        raise ValueError(f"keep_last={keep_last}: keep at least one checkpoint, or None for all")
    if name == "memory" and isinstance(keep_last, Mapping) and last not in (None, 1):
        raise ValueError(f"keep_last={keep_last}: memory keeps 1, while the next one is made beside it")
    return last


def _claims(storage: StorageView) -> dict[int, bytes]:
    return {
        generation: storage.read_bytes(claim_name(generation), MAX_CLAIM_NBYTES)
        for generation in claimed_generations(storage)
    }


def _packed_claims(storage: StorageView) -> bytes:
    claims = {generation: base64.b64encode(claim).decode() for generation, claim in _claims(storage).items()}
    return json.dumps(claims).encode()


def _unpacked_claims(data: bytes) -> dict[int, bytes]:
    return {int(generation): base64.b64decode(claim) for generation, claim in json.loads(data).items()}


# When the interpreter ends, no library starts a thread or a connection any more: too late to bring anything home.
_living: weakref.WeakSet[Tiers] = weakref.WeakSet()


def _tell_unmoved() -> None:
    for tiers in list(_living):
        load = None if tiers._mover is None else tiers._mover.pending()
        if load is not None:
            _log.error(
                "step %s is durable in %s, but is not in %s: the program ended before it had come there. End with "
                "Checkpointer.close(), as `with` does; started again with the same tiers, the job brings it there",
                load.manifest.step,
                tiers.first.location(),
                tiers.home.location(),
            )


atexit.register(_tell_unmoved)


def _entry(checkpoint: Checkpoint) -> Entry:
    manifest = checkpoint.manifest
    return Entry(manifest.step, manifest.generation, checkpoint.directory)
