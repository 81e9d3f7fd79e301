"""The places where a run's checkpoints lie: shared memory, the local disk, and its own place, the home."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.keep import Keep, KeepRule
from ckptengine.catalog.lease import Lease, is_old
from ckptengine.catalog.listing import (
    Entry,
    claim_name,
    newest,
    read_manifest,
    step_directory,
)
from ckptengine.catalog.manifest import Manifest
from ckptengine.catalog.receipt import StorageStore
from ckptengine.catalog.retention import remove_leftovers, retain
from ckptengine.catalog.site import Site, find_sites
from ckptengine.comm.agree import from_first, on_all, share
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, SaveFailedError, StorageError
from ckptengine.lifecycle import Living
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.save.job import Job, Target
from ckptengine.snapshot.shared_arena import SharedArena
from ckptengine.storage.base import Storage, StorageView, join
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.open import local_path, open_storage
from ckptengine.storage.within import within
from ckptengine.tiers.apart import check_apart
from ckptengine.tiers.claims import claims_of, packed, unpacked
from ckptengine.tiers.copy import check_same_run, copy_commit
from ckptengine.tiers.inventory import Inventory, take_inventory
from ckptengine.tiers.keep import rules_of
from ckptengine.tiers.memory import MemoryTier, memory_root
from ckptengine.tiers.mover import Load, Mover, Share, carry
from ckptengine.tiers.overlay import Overlay
from ckptengine.tiers.pace import Pace
from ckptengine.tiers.progress import shown

__all__ = ["Tiers"]

_MESSAGES = re.compile(r"moves-[0-9a-f]{16}")

_log = logging.getLogger("ckptengine")


class Tiers:
    """What one rank knows of the places of its run; methods marked "all ranks" are called by all, in one order.

    `first` is where saves commit: the local tier, or the home where there is none. `home` is the run's own place, which
    all ranks see. `uploaded` is called on rank 0 with the manifest and the location of each checkpoint that has come
    there from a nearer tier; attempts that `in_use` returns are not deleted. Raises `ValueError` for a `keep` that
    names a tier which is not there.
    """

    def __init__(
        self,
        run: str,
        comm: Communicator,
        timeout: float,
        *,
        local: str | os.PathLike[str] | None,
        memory: bool | str | os.PathLike[str],
        keep: Keep,
        upload_bytes_per_second: float | None,
        storage_options: Mapping[str, Any] | None,
        uploaded: Callable[[Manifest, str], None] | None = None,
        in_use: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._comm, self._timeout = comm, timeout
        self._tell_uploaded, self._in_use = uploaded, in_use
        self.home = open_storage(run, storage_options, timeout)
        self.home.check_shared(comm.world_size)
        self.local = None if local is None else _local(local)
        self.first: Storage = self.local or self.home
        protocol = run.partition("://")[0] if "://" in run else "run"
        self._names = {"memory"} if memory else set()
        self._names |= {"local", protocol} if local is not None else {protocol}
        rules = {name: rules_of(keep, name, self._names) for name in self._names}
        self._home_keep, self._first_keep = rules[protocol], rules["local" if local is not None else protocol]
        self._pace = None if upload_bytes_per_second is None else Pace(upload_bytes_per_second)
        self._memory_base = memory
        self.memory: MemoryTier | None = None
        self._site: Site | None = None
        self._memory_site: Site | None = None
        self._inventory = Inventory()
        self._views: list[StorageView] = [self.home]
        self._mover: Mover | None = None
        self._messages: str | None = None
        self._generation = 0  # on rank 0: the newest that this life has claimed or found; a later one is another job's
        self._newest = ""  # the attempt that this life has committed last
        self._copied: set[tuple[str, int]] = set()  # places of this node, and the generations whose claims they have
        self._cleaning = threading.Lock()  # after a commit and after a move, which must not meet in one directory
        self.uploaded: int | None = None
        """On rank 0: the newest step that this life has brought home from a nearer tier."""
        self.found: int | None = None
        """On rank 0: the newest step that `open` has found in any tier."""
        _living.add(self)

    @property
    def _near(self) -> list[tuple[Storage, Site]]:
        """The tiers before the home, the fastest first."""
        found: list[tuple[Storage, Site]] = []
        if self.memory is not None and self._memory_site is not None:
            found.append((self.memory.storage, self._memory_site))
        if self.local is not None and self._site is not None:
            found.append((self.local, self._site))
        return found

    def check_apart(self) -> None:
        """Raise `ValueError` where one of the run's places is, or lies in, another one of them."""
        places = {"run": str(self.home.root)} if isinstance(self.home, LocalStorage) else {}
        if self.local is not None:
            places["local"] = str(self.local.root)
        if self._memory_base:
            base = self._memory_base
            places["memory"] = memory_root(self.home.location(), True if isinstance(base, bool) else base)
        check_apart(places)

    def open(self, token: str) -> None:
        """Make the near tiers ready, and see who shares them; all ranks. `token` is this life's, 16 hex digits."""
        if self.local is None and not self._memory_base:
            return
        doing = "opening the tiers"

        def make() -> None:
            if self.local is not None:
                within(self._timeout, doing, self.local.create)
            if self._memory_base:
                base = self._memory_base
                root = memory_root(self.home.location(), True if isinstance(base, bool) else base)
                self.memory = MemoryTier(root, self._comm.rank)
                self.memory.open()

        on_all(self._comm, make, self._timeout, doing)
        storages = [self.memory.storage] if self.memory is not None else []
        storages += [self.local] if self.local is not None else []
        sites = find_sites(storages, self._comm, token[:12], self._timeout)
        if self.memory is not None:
            self._memory_site = sites[0]
        if self.local is not None:
            self._site = sites[-1]
        self._compare_claims(doing)
        store = self._comm.store()
        if store is None:
            self._messages = f"moves-{token}"
            store = StorageStore(self.home, self._messages)
            if self._comm.rank == 0:
                try:
                    within(self._timeout, doing, self._sweep_messages)
                except DeadlineError as problem:
                    self._tell([str(problem)])
        # The local disk first: what lies in memory is replaced while it is read.
        source = Overlay([storage for storage, _ in self._near[::-1]])
        self._mover = Mover(
            source, self.home, self._comm, store, token, self._came_home, lambda: self._generation, self._pace
        )

    def _compare_claims(self, doing: str) -> None:
        """Tell a tier of another run by its claims; what lies in memory of one is removed."""

        def read() -> bytes:
            found = within(self._timeout, doing, lambda: claims_of(self.home))
            self._generation = max(found, default=0)
            return packed(found)

        claims = from_first(self._comm, read, self._timeout, doing)

        def compare() -> None:
            # The disk first: where it is refused, what lies in memory may be needed yet.
            local, site = self.local, self._site
            if local is not None and site is not None and site.leads:
                within(self._timeout, doing, lambda: self._begin_local(local, site, unpacked(claims)))
            leads = self._memory_site is not None and self._memory_site.leads
            if self.memory is not None and leads and self.memory.note_claims(unpacked(claims)):
                _log.warning(
                    "%s held checkpoints of an earlier run at this place, which were removed",
                    self.memory.storage.location(),
                )
            if self._comm.rank == 0:
                self.found = within(self._timeout, doing, self.newest)

        on_all(self._comm, compare, self._timeout, doing)

    def _begin_local(self, local: LocalStorage, site: Site, claims: Mapping[int, bytes]) -> None:
        """Check that the local tier is this run's, give it the claims that it lacks, and sweep it."""
        check_same_run(self.home, local)
        for generation, claim in claims.items():
            if local.size(claim_name(generation)) is None:
                local.put_if_absent(claim_name(generation), claim)
        if site.shared:
            self._tell(remove_leftovers(local))

    def newest(self) -> int | None:
        """Return the newest step that rank 0 sees in any tier, None where there is none."""
        found = newest(Overlay([*(storage for storage, _ in self._near), self.home]))
        return None if found is None else found.step

    def claim(self, parent: tuple[int, int] | None) -> int:
        """Claim the next generation in all places, on rank 0; a home that can't be reached gets its claim later."""
        near = [storage for storage, _ in self._near]
        self._generation = claim_generation(self.home, parent, near, self.local)
        return self._generation

    def target(self, job: Job) -> Target:
        """Return where a save that goes to the first tier is committed in memory; for `Saver`, before that commit."""
        memory, site = self.memory, self._memory_site
        assert memory is not None
        if site is not None and site.leads:
            self._copy_claims(memory.storage, job.generation)
            memory.withdraw(job.target.directory, job.generation, job.attempt)
        return replace(
            job.target,
            storage=memory.storage,
            site=site,
            meeting=self._meeting(memory.storage, site),
            committed=lambda _, attempt: memory.tidy(attempt),
        )

    def kept(self, arena: SharedArena | None) -> None:
        """Note that the image in an arena is committed; see `MemoryTier.kept`."""
        if self.memory is not None:
            self.memory.kept(arena)

    def take(self, nbytes: int) -> SharedArena | None:
        """Return an arena in shared memory; see `MemoryTier.take`."""
        return None if self.memory is None else self.memory.take(nbytes)

    def prepare(self, nbytes: int) -> None:
        """Have the arenas in shared memory there before they are needed."""
        if self.memory is not None:
            self.memory.prepare(nbytes)

    def abandon(self) -> None:
        """Forget the arenas and what is being moved, in a forked process: they are the parent's."""
        self._mover, self._cleaning = None, threading.Lock()
        if self.memory is not None:
            self.memory.abandon()
            self.memory = None

    @property
    def site(self) -> Site | None:
        """The ranks that see the first tier as this one does, None: all."""
        return self._site

    @property
    def meeting(self) -> tuple[Storage, str] | None:
        """Where all ranks see the messages of a save, where they have no store; None: in the attempt's directory."""
        return None if self._site is None else self._meeting(self.first, self._site)

    def _meeting(self, storage: Storage, site: Site | None) -> tuple[Storage, str] | None:
        """Return a directory that lasts as long as this life: an attempt's goes when a commit elsewhere has failed."""
        if self._messages is None:
            return None
        return (self.home if site is None or not site.shared else storage), self._messages

    def committed(self, generation: int, attempt: str, step: int, directory: str) -> None:
        """After a commit in the first tier, on the first rank of each site: have it moved on, delete what may go."""
        self._newest = attempt
        if self._mover is not None and self.local is not None and self._comm.rank == 0:
            entry = Entry(step, generation, directory)
            manifest = self._manifest_of(self.local, entry)
            if manifest is None:
                return  # newer ones have replaced it meanwhile
            holder = {record.name: rank for rank, record in enumerate(manifest.archives)}
            self._mover.offer(Load(directory, manifest, holder | {manifest.layout.name: 0}))
        if self.local is not None:
            self._copy_claims(self.local, generation)
        self._retain(self.first, self._first_keep)

    @staticmethod
    def _manifest_of(storage: Storage, entry: Entry) -> Manifest | None:
        """Return a committed checkpoint's manifest, None where it is gone; one failed read must not cost the upload."""
        for left in (2, 1, 0):
            try:
                return read_manifest(storage, entry)
            except StorageError:
                if storage.size(entry.manifest) is None:
                    return None
                if not left:
                    raise
                time.sleep(_REREAD_SECONDS)
        raise AssertionError("unreachable")

    def _copy_claims(self, storage: Storage, generation: int) -> None:
        """Give a tier of this node the run's claims, once in a life: by them the next one knows whose it is."""
        key = storage.location(), generation
        if self._comm.rank == 0 or key in self._copied:  # rank 0 has claimed there
            return
        with contextlib.suppress(CheckpointError):
            claims = claims_of(self.home)
            for number, claim in claims.items():
                storage.put_if_absent(claim_name(number), claim)
            if generation in claims:
                self._copied.add(key)

    def _came_home(self, load: Load) -> None:
        self.uploaded = load.manifest.step
        _log.info("%s: step %s is uploaded", self.home.location(), self.uploaded)
        if self._tell_uploaded is not None:
            self._tell_uploaded(load.manifest, self.home.location(load.directory))
        try:
            self._retain(self.home, self._home_keep, load.manifest.attempt)
            if self.local is not None:
                self._retain(self.local, self._first_keep, load.manifest.attempt)
        except CheckpointError as error:
            _log.warning("%s: cleaning up failed: %s", self.home.location(), error)

    def _retain(self, storage: Storage, keep: Collection[KeepRule], moved: str = "") -> None:
        """Delete what may go; not what is still to be moved, of which the attempt `moved` is none any more.

        What this life has committed last, and has moved last, is known without reading, and stays.
        """
        with self._cleaning:
            self._tell(remove_leftovers(storage))
            if keep:
                protected = set() if self._mover is None else self._mover.protected
                newest = {self._newest, moved} if storage is self.home else {self._newest}
                self._tell(retain(storage, keep, (protected - {moved}) | newest | set(self._in_use())))

    def _tell(self, problems: list[str]) -> None:
        for problem in problems:
            _log.warning("%s: %s", self.home.location(), problem)

    def views(self) -> list[StorageView]:
        """Return where to look for a checkpoint: all tiers, then without the fastest, and so on; all ranks."""
        near = [storage for storage, _ in self._near]
        if not near:
            return [self.home]
        self._inventory = take_inventory(self._near, self._comm, self._timeout)
        reported = self._inventory.reported
        self._views = [Overlay([*near[number:], self.home, *reported[number:]]) for number in range(len(near))]
        self._views.append(self.home)
        return self._views

    def bring(self, checkpoint: Checkpoint) -> None:
        """Bring a checkpoint home that only single nodes have, so that every rank can read all of it; all ranks."""
        # What lies in a faster tier than those of its view may be damaged.
        skipped = next(number for number, view in enumerate(self._views) if view is checkpoint.storage)
        near = self._near[skipped:]
        if all(site.shared for _, site in near):
            return
        doing = f"bringing {checkpoint.directory} to {self.home.location()}"
        begun: list[Load] = []  # on rank 0, what is brought
        with contextlib.ExitStack() as held:

            def begin() -> bytes:
                load = within(self._timeout, doing, lambda: self._needed(checkpoint, near, skipped))
                if load is None:
                    return json.dumps([]).encode()
                begun.append(load)
                lease = Lease(self.home, load.data)
                within(self._timeout, doing, lease.__enter__)
                held.callback(within, self._timeout, doing, lambda: lease.__exit__(None, None, None))
                return json.dumps([one.encode().decode() for one in load.shares(self._comm.world_size)]).encode()

            shares = json.loads(from_first(self._comm, begin, self._timeout, doing))
            if not shares:
                return

            def copy() -> None:
                own, source = Share.decode(shares[self._comm.rank].encode()), Overlay([one for one, _ in near])
                pieces: list[int] = []
                one = functools.partial(carry, own, source, self.home, progress=pieces.append)
                within(self._timeout, doing, one, lambda: len(pieces))

            on_all(self._comm, copy, self._timeout, doing)

            def commit() -> bytes:
                for load in begun:
                    one = functools.partial(copy_commit, checkpoint.storage, self.home, load.directory, load.manifest)
                    within(self._timeout, doing, one)
                return b""

            from_first(self._comm, commit, self._timeout, doing)
        if isinstance(checkpoint.storage, Overlay):
            checkpoint.storage.forget()

    def _needed(self, checkpoint: Checkpoint, near: list[tuple[Storage, Site]], skipped: int) -> Load | None:
        """Return what has to be brought home of a checkpoint, None where all ranks can read it as it is."""
        name = _entry(checkpoint).manifest
        shared = [storage for storage, site in near if site.shared]
        if any(storage.size(name) is not None for storage in (*shared, self.home)):
            return None
        return self._load(checkpoint.directory, checkpoint.manifest, skipped)

    def _load(self, directory: str, manifest: Manifest, skipped: int = 0) -> Load:
        """Return how the ranks share the work of bringing a checkpoint of an earlier life home."""
        data, holder = attempt_directory(directory, manifest.attempt), {}
        for number, record in enumerate((*manifest.archives, manifest.layout)):
            name = join(data, record.name)
            site = next((site for storage, site in self._near[skipped:] if storage.size(name) is not None), None)
            if site is not None:
                holder[record.name] = site.ranks[number % len(site.ranks)]
            else:
                holder[record.name] = self._inventory.holder(name, skipped)
        return Load(directory, manifest, holder)

    def restored(self, generation: int, step: int) -> None:
        """After a restore, on rank 0: have what was restored moved home, where it is not there yet."""
        mover = self._mover
        if mover is None or self._comm.rank != 0:
            return
        entry = Entry(step, generation, step_directory(step))
        doing = f"looking whether step {step} is in {self.home.location()}"
        try:
            load = within(self._timeout, doing, lambda: self._to_move(entry))
            if load is not None:
                mover.offer(load)
        except CheckpointError as error:
            _log.warning("step %d is not brought to %s: %s", step, self.home.location(), error)

    def _to_move(self, entry: Entry) -> Load | None:
        """Return what was restored from a near tier and is not at home."""
        near = Overlay([storage for storage, _ in self._near])
        if near.size(entry.manifest) is None or self.home.size(entry.manifest) is not None:
            return None
        if not self.home.list():
            _log.warning(
                "%s is empty, and step %s was found in %s: the run goes on there. To begin anew, remove both",
                self.home.location(),
                entry.step,
                near.location(),
            )
        return self._load(entry.directory, read_manifest(near, entry))

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
            total = waiting.manifest.nbytes // self._comm.world_size
        with shown(what, total) if waiting is not None else contextlib.nullcontext(lambda done: None) as show:
            word = b""
            while not word:
                error: Exception | None = None
                if self._comm.rank == 0:
                    word = b"." if mover.settle(_SLICE_SECONDS, show) else b""
                    still, problem = mover.still(began)
                    waiting = mover.pending()
                    if not word and still > timeout and waiting is not None:
                        error = SaveFailedError(
                            f"step {waiting.manifest.step} is durable in {self.first.location()}, but is not in "
                            f"{self.home.location()}: {problem}. Started again with the same tiers, the job brings it "
                            "there"
                        )
                mine = word if self._comm.rank == 0 else None
                word = share(self._comm, mine, error, timeout + 2 * _SLICE_SECONDS, "waiting for uploads")

    def tell_kept(self) -> None:
        """Say where a checkpoint is that is in memory only, at the end of a job; on rank 0."""
        if self.memory is None or self._comm.rank != 0:
            return
        with contextlib.suppress(CheckpointError):
            looking, kept = "looking where the last step is", newest(self.memory.storage)
            durable = within(self._timeout, looking, lambda: newest(self.first))
            if kept is None or (durable is not None and durable.order >= kept.order):
                return
            _log.warning(
                "step %s is in memory only, in %s, which a reboot empties: start the job again, and it comes to %s",
                kept.step,
                self.memory.storage.location(),
                self.home.location(),
            )

    def close(self, *, done: bool, idle: bool = True) -> None:
        """End the moving, and give the memory back. `done`: the job has ended well; then nothing stays in memory.

        Without `idle` a save may still read what lies in memory: then it stays until the process ends. Does not wait
        for uploads: `flush` does.
        """
        self.stop()
        _living.discard(self)
        try:
            messages = self._messages
            if messages is not None and self._comm.rank == 0 and done:
                for storage in (self.home, self.first, *([self.memory.storage] if self.memory is not None else [])):
                    within(self._timeout, "removing messages", functools.partial(storage.delete_tree, messages))
            if self.memory is not None and idle:
                self.memory.close(remove=done)
                if done and self._memory_site is not None and self._memory_site.leads:
                    self.memory.clear()
        except CheckpointError as error:
            self._tell([f"not all that the job leaves behind could be removed: {error}"])

    def forget(self) -> None:
        """End for a Checkpointer that is gone and was never closed."""
        mover, self._mover = self._mover, None
        if mover is not None:
            mover.stop(wait=False)
        if self.memory is not None:
            self.memory.close(remove=False)

    def stop(self) -> None:
        """End the moving; nothing is waited for any more."""
        mover, self._mover = self._mover, None
        if mover is not None:
            mover.stop()

    def end(self) -> None:
        """End the moving at the end of the interpreter, for a Checkpointer that was not closed."""
        waiting = None if self._mover is None else self._mover.pending()
        if waiting is not None:
            step, first = waiting.manifest.step, self.first.location()
            self._tell([f"step {step} is in {first} only: the next start brings it here, and so would have close()"])
        self.stop()

    def _sweep_messages(self) -> None:
        """Remove what jobs without a key-value store have left of their messages."""
        try:
            for storage in (self.home, *(near for near, _ in self._near)):
                for name in filter(_MESSAGES.fullmatch, storage.list()):
                    if name != self._messages and is_old(storage, name, storage.now()):
                        storage.delete_tree(name)
        except CheckpointError as error:
            self._tell([f"messages of earlier jobs were not removed: {error}"])


_REREAD_SECONDS = 0.2
_SLICE_SECONDS = 5.0
"""How often rank 0 tells the others, at the end of a job, that it still waits for uploads."""


def _local(local: str | os.PathLike[str]) -> LocalStorage:
    return LocalStorage(local_path(local, "local"))


def _entry(checkpoint: Checkpoint) -> Entry:
    manifest = checkpoint.manifest
    return Entry(manifest.step, manifest.generation, checkpoint.directory)


_living: Living[Tiers] = Living(forked=Tiers.abandon, ended=Tiers.end)
