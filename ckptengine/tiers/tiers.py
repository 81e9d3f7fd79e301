"""The tiers of a run: shared memory, the local disk, and its own place, the persistent tier."""

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
from ckptengine.tiers.overlay import Overlay
from ckptengine.tiers.pace import Pace
from ckptengine.tiers.progress import shown
from ckptengine.tiers.uploader import Upload, Uploader, UploadPart, upload_part

__all__ = ["Tiers"]

_MESSAGES = re.compile(r"moves-[0-9a-f]{16}")

_log = logging.getLogger("ckptengine")


class Tiers:
    """What one rank knows of the places of its run; methods marked "all ranks" are called by all, in one order.

    `first` is where saves commit: the local tier, or the persistent one where there is none. `persistent` is the run's
    own place, which all ranks see. `uploaded` is called on rank 0 with the manifest and the location of each checkpoint
    that has come there from a faster tier; attempts that `in_use` returns are not deleted. Raises `ValueError` for a
    `keep` that names a tier which is not there.
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
        self.persistent = open_storage(run, storage_options, timeout)
        self.persistent.check_shared(comm.world_size)
        self.local = None if local is None else _local(local)
        self.first: Storage = self.local or self.persistent
        protocol = run.partition("://")[0] if "://" in run else "run"
        self._names = {"memory"} if memory else set()
        self._names |= {"local", protocol} if local is not None else {protocol}
        rules = {name: rules_of(keep, name, self._names) for name in self._names}
        self._persistent_keep, self._first_keep = rules[protocol], rules["local" if local is not None else protocol]
        self._pace = None if upload_bytes_per_second is None else Pace(upload_bytes_per_second)
        self._memory_base = memory
        self.memory: MemoryTier | None = None
        self._site: Site | None = None
        self._memory_site: Site | None = None
        self._inventory = Inventory()
        self._views: list[StorageView] = [self.persistent]
        self._uploader: Uploader | None = None
        self._messages: str | None = None
        self._generation = 0  # on rank 0: the newest that this life has claimed or found; a later one is another job's
        self._newest = ""  # the attempt that this life has committed last
        self._copied: set[tuple[str, int]] = set()  # places of this node, and the generations whose claims they have
        self._cleaning = threading.Lock()  # after a commit and after an upload, which must not meet in one directory
        self.uploaded: int | None = None
        """On rank 0: the newest step that this life has uploaded from a faster tier."""
        self.found: int | None = None
        """On rank 0: the newest step that `open` has found in any tier."""
        _living.add(self)

    @property
    def _faster(self) -> list[tuple[Storage, Site]]:
        """The tiers before the persistent one, the fastest first."""
        found: list[tuple[Storage, Site]] = []
        if self.memory is not None and self._memory_site is not None:
            found.append((self.memory.storage, self._memory_site))
        if self.local is not None and self._site is not None:
            found.append((self.local, self._site))
        return found

    def check_apart(self) -> None:
        """Raise `ValueError` where one of the run's places is, or lies in, another one of them."""
        places = {"run": str(self.persistent.root)} if isinstance(self.persistent, LocalStorage) else {}
        if self.local is not None:
            places["local"] = str(self.local.root)
        if self._memory_base:
            base = self._memory_base
            places["memory"] = memory_root(self.persistent.location(), True if isinstance(base, bool) else base)
        check_apart(places)

    def open(self, token: str) -> None:
        """Make the faster tiers ready, and see who shares them; all ranks. `token` is this life's, 16 hex digits."""
        if self.local is None and not self._memory_base:
            return
        doing = "opening the tiers"

        def make() -> None:
            if self.local is not None:
                within(self._timeout, doing, self.local.create)
            if self._memory_base:
                base = self._memory_base
                root = memory_root(self.persistent.location(), True if isinstance(base, bool) else base)
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
            store = StorageStore(self.persistent, self._messages)
            if self._comm.rank == 0:
                try:
                    within(self._timeout, doing, self._sweep_messages)
                except DeadlineError as problem:
                    self._tell([str(problem)])
        # The local disk first: what lies in memory is replaced while it is read.
        source = Overlay([storage for storage, _ in self._faster[::-1]])
        self._uploader = Uploader(
            source, self.persistent, self._comm, store, token, self._after_upload, lambda: self._generation, self._pace
        )

    def _compare_claims(self, doing: str) -> None:
        """Tell a tier of another run by its claims; what lies in memory of one is removed."""

        def read() -> bytes:
            found = within(self._timeout, doing, lambda: claims_of(self.persistent))
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
        check_same_run(self.persistent, local)
        for generation, claim in claims.items():
            if local.size(claim_name(generation)) is None:
                local.put_if_absent(claim_name(generation), claim)
        if site.shared:
            self._tell(remove_leftovers(local))

    def newest(self) -> int | None:
        """Return the newest step that rank 0 sees in any tier, None where there is none."""
        found = newest(Overlay([*(storage for storage, _ in self._faster), self.persistent]))
        return None if found is None else found.step

    def claim(self, parent: tuple[int, int] | None) -> int:
        """Claim the next generation in all tiers, on rank 0; a store that can't be reached gets its claim later."""
        faster = [storage for storage, _ in self._faster]
        self._generation = claim_generation(self.persistent, parent, faster, self.local)
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
            rendezvous=self._rendezvous(memory.storage, site),
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
        """Forget the arenas and what is being uploaded, in a forked process: they are the parent's."""
        self._uploader, self._cleaning = None, threading.Lock()
        if self.memory is not None:
            self.memory.abandon()
            self.memory = None

    @property
    def site(self) -> Site | None:
        """The ranks that see the first tier as this one does, None: all."""
        return self._site

    @property
    def rendezvous(self) -> tuple[Storage, str] | None:
        """Where all ranks see the messages of a save, where they have no store; None: in the attempt's directory."""
        return None if self._site is None else self._rendezvous(self.first, self._site)

    def _rendezvous(self, storage: Storage, site: Site | None) -> tuple[Storage, str] | None:
        """Return a directory that lasts as long as this life: an attempt's goes when a commit elsewhere has failed."""
        if self._messages is None:
            return None
        return (self.persistent if site is None or not site.shared else storage), self._messages

    def committed(self, generation: int, attempt: str, step: int, directory: str) -> None:
        """After a commit in the first tier, on the first rank of each site: have it uploaded, delete what may go."""
        self._newest = attempt
        if self._uploader is not None and self.local is not None and self._comm.rank == 0:
            entry = Entry(step, generation, directory)
            manifest = self._manifest_of(self.local, entry)
            if manifest is None:
                return  # newer ones have replaced it meanwhile
            holder = {record.name: rank for rank, record in enumerate(manifest.archives)}
            self._uploader.offer(Upload(directory, manifest, holder | {manifest.layout.name: 0}))
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
            claims = claims_of(self.persistent)
            for number, claim in claims.items():
                storage.put_if_absent(claim_name(number), claim)
            if generation in claims:
                self._copied.add(key)

    def _after_upload(self, upload: Upload) -> None:
        self.uploaded = upload.manifest.step
        _log.info("%s: step %s is uploaded", self.persistent.location(), self.uploaded)
        if self._tell_uploaded is not None:
            self._tell_uploaded(upload.manifest, self.persistent.location(upload.directory))
        try:
            self._retain(self.persistent, self._persistent_keep, upload.manifest.attempt)
            if self.local is not None:
                self._retain(self.local, self._first_keep, upload.manifest.attempt)
        except CheckpointError as error:
            _log.warning("%s: cleaning up failed: %s", self.persistent.location(), error)

    def _retain(self, storage: Storage, keep: Collection[KeepRule], uploaded: str = "") -> None:
        """Delete what may go; not what is still to be uploaded, of which the attempt `uploaded` is none any more.

        What this life has committed last, and has uploaded last, is known without reading, and stays.
        """
        with self._cleaning:
            self._tell(remove_leftovers(storage))
            if keep:
                protected = set() if self._uploader is None else self._uploader.protected
                newest = {self._newest, uploaded} if storage is self.persistent else {self._newest}
                self._tell(retain(storage, keep, (protected - {uploaded}) | newest | set(self._in_use())))

    def _tell(self, problems: list[str]) -> None:
        for problem in problems:
            _log.warning("%s: %s", self.persistent.location(), problem)

    def views(self) -> list[StorageView]:
        """Return where to look for a checkpoint: all tiers, then without the fastest, and so on; all ranks."""
        faster = [storage for storage, _ in self._faster]
        if not faster:
            return [self.persistent]
        self._inventory = take_inventory(self._faster, self._comm, self._timeout)
        reported = self._inventory.reported
        self._views = [
            Overlay([*faster[number:], self.persistent, *reported[number:]]) for number in range(len(faster))
        ]
        self._views.append(self.persistent)
        return self._views

    def upload_for_all(self, checkpoint: Checkpoint) -> None:
        """Upload a checkpoint that only single nodes have, so that every rank can read all of it; all ranks."""
        # What lies in a faster tier than those of its view may be damaged.
        skipped = next(number for number, view in enumerate(self._views) if view is checkpoint.storage)
        faster = self._faster[skipped:]
        if all(site.shared for _, site in faster):
            return
        doing = f"bringing {checkpoint.directory} to {self.persistent.location()}"
        begun: list[Upload] = []  # on rank 0, what is uploaded
        with contextlib.ExitStack() as held:

            def begin() -> bytes:
                upload = within(self._timeout, doing, lambda: self._needed(checkpoint, faster, skipped))
                if upload is None:
                    return json.dumps([]).encode()
                begun.append(upload)
                lease = Lease(self.persistent, upload.data)
                within(self._timeout, doing, lease.__enter__)
                held.callback(within, self._timeout, doing, lambda: lease.__exit__(None, None, None))
                return json.dumps([one.encode().decode() for one in upload.shares(self._comm.world_size)]).encode()

            shares = json.loads(from_first(self._comm, begin, self._timeout, doing))
            if not shares:
                return

            def copy() -> None:
                own, source = UploadPart.decode(shares[self._comm.rank].encode()), Overlay([one for one, _ in faster])
                pieces: list[int] = []
                one = functools.partial(upload_part, own, source, self.persistent, progress=pieces.append)
                within(self._timeout, doing, one, lambda: len(pieces))

            on_all(self._comm, copy, self._timeout, doing)

            def commit() -> bytes:
                for upload in begun:
                    one = functools.partial(
                        copy_commit, checkpoint.storage, self.persistent, upload.directory, upload.manifest
                    )
                    within(self._timeout, doing, one)
                return b""

            from_first(self._comm, commit, self._timeout, doing)
        if isinstance(checkpoint.storage, Overlay):
            checkpoint.storage.forget()

    def _needed(self, checkpoint: Checkpoint, faster: list[tuple[Storage, Site]], skipped: int) -> Upload | None:
        """Return what has to be uploaded of a checkpoint, None where all ranks can read it as it is."""
        name = _entry(checkpoint).manifest
        shared = [storage for storage, site in faster if site.shared]
        if any(storage.size(name) is not None for storage in (*shared, self.persistent)):
            return None
        return self._load(checkpoint.directory, checkpoint.manifest, skipped)

    def _load(self, directory: str, manifest: Manifest, skipped: int = 0) -> Upload:
        """Return how the ranks share the upload of a checkpoint of an earlier life."""
        data, holder = attempt_directory(directory, manifest.attempt), {}
        for number, record in enumerate((*manifest.archives, manifest.layout)):
            name = join(data, record.name)
            site = next((site for storage, site in self._faster[skipped:] if storage.size(name) is not None), None)
            if site is not None:
                holder[record.name] = site.ranks[number % len(site.ranks)]
            else:
                holder[record.name] = self._inventory.holder(name, skipped)
        return Upload(directory, manifest, holder)

    def restored(self, generation: int, step: int) -> None:
        """After a restore, on rank 0: have what was restored uploaded, where it is not in the persistent tier yet."""
        uploader = self._uploader
        if uploader is None or self._comm.rank != 0:
            return
        entry = Entry(step, generation, step_directory(step))
        doing = f"looking whether step {step} is in {self.persistent.location()}"
        try:
            upload = within(self._timeout, doing, lambda: self._to_upload(entry))
            if upload is not None:
                uploader.offer(upload)
        except CheckpointError as error:
            _log.warning("step %d is not uploaded to %s: %s", step, self.persistent.location(), error)

    def _to_upload(self, entry: Entry) -> Upload | None:
        """Return what was restored from a faster tier and is not in the persistent one."""
        faster = Overlay([storage for storage, _ in self._faster])
        if faster.size(entry.manifest) is None or self.persistent.size(entry.manifest) is not None:
            return None
        if not self.persistent.list():
            _log.warning(
                "%s is empty, and step %s was found in %s: the run goes on there. To begin anew, remove both",
                self.persistent.location(),
                entry.step,
                faster.location(),
            )
        return self._load(entry.directory, read_manifest(faster, entry))

    def flush(self, timeout: float) -> None:
        """Wait until the newest checkpoint is uploaded; all ranks, and rank 0 tells the others how it goes.

        Gives up `timeout` seconds after rank 0 has last moved a byte or heard of another rank. Raises `SaveFailedError`
        on all ranks saying where the checkpoint is and what keeps it there.
        """
        uploader = self._uploader
        if uploader is None:
            return
        began = time.monotonic()
        waiting = uploader.pending() if self._comm.rank == 0 else None
        what, total = "", 0
        if waiting is not None:
            what = f"step {waiting.manifest.step} to {self.persistent.location()}"
            total = waiting.manifest.nbytes // self._comm.world_size
        with shown(what, total) if waiting is not None else contextlib.nullcontext(lambda done: None) as show:
            word = b""
            while not word:
                error: Exception | None = None
                if self._comm.rank == 0:
                    word = b"." if uploader.settle(_SLICE_SECONDS, show) else b""
                    still, problem = uploader.still(began)
                    waiting = uploader.pending()
                    if not word and still > timeout and waiting is not None:
                        error = SaveFailedError(
                            f"step {waiting.manifest.step} is durable in {self.first.location()}, but is not in "
                            f"{self.persistent.location()}: {problem}. Started again with the same tiers, the job "
                            "uploads it"
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
                self.persistent.location(),
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
                for storage in (
                    self.persistent,
                    self.first,
                    *([self.memory.storage] if self.memory is not None else []),
                ):
                    within(self._timeout, "removing messages", functools.partial(storage.delete_tree, messages))
            if self.memory is not None and idle:
                self.memory.close(remove=done)
                if done and self._memory_site is not None and self._memory_site.leads:
                    self.memory.clear()
        except CheckpointError as error:
            self._tell([f"not all that the job leaves behind could be removed: {error}"])

    def forget(self) -> None:
        """End for a Checkpointer that is gone and was never closed."""
        uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.stop(wait=False)
        if self.memory is not None:
            self.memory.close(remove=False)

    def stop(self) -> None:
        """End the moving; nothing is waited for any more."""
        uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.stop()

    def end(self) -> None:
        """End the moving at the end of the interpreter, for a Checkpointer that was not closed."""
        waiting = None if self._uploader is None else self._uploader.pending()
        if waiting is not None:
            step, first = waiting.manifest.step, self.first.location()
            self._tell([f"step {step} is in {first} only: the next start uploads it here, and close() would have"])
        self.stop()

    def _sweep_messages(self) -> None:
        """Remove what jobs without a key-value store have left of their messages."""
        try:
            for storage in (self.persistent, *(faster for faster, _ in self._faster)):
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
