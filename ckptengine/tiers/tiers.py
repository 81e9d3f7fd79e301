"""The tiers of a run at work: what follows a commit and a restore, and the end of a life."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Collection

from ckptengine.catalog.keep import Keep
from ckptengine.catalog.listing import Entry, manifest_name, newest, step_directory
from ckptengine.catalog.manifest import Manifest
from ckptengine.catalog.receipt import StorageStore
from ckptengine.catalog.site import Site
from ckptengine.comm.agree import share
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, SaveFailedError, StorageError
from ckptengine.lifecycle import Living
from ckptengine.save.attempt import Committed
from ckptengine.storage.base import Storage, join
from ckptengine.storage.within import within
from ckptengine.tiers.claims import Claims
from ckptengine.tiers.cleaning import Cleaning
from ckptengine.tiers.kept_images import KeptImages
from ckptengine.tiers.messages import Messages
from ckptengine.tiers.overlay import Overlay
from ckptengine.tiers.pace import Pace
from ckptengine.tiers.places import Places
from ckptengine.tiers.progress import shown
from ckptengine.tiers.sources import Sources
from ckptengine.tiers.uploader import Upload, Uploader

__all__ = ["Tiers"]

_log = logging.getLogger("ckptengine")


class Tiers:
    """What one rank does with the places of its run; methods marked "all ranks" are called by all, in one order.

    `tell_uploaded` is called on rank 0 with the manifest and the location of each checkpoint that has come to the
    persistent tier from a faster one; attempts that `in_use` returns are not deleted. Raises `ValueError` for a `keep`
    that names a tier which is not there.
    """

    def __init__(
        self,
        places: Places,
        comm: Communicator,
        timeout: float,
        *,
        keep: Keep,
        upload_bytes_per_second: float | None,
        tell_uploaded: Callable[[Manifest, str], None] | None = None,
        in_use: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self.places, self._comm, self._timeout = places, comm, timeout
        places.persistent.check_shared(comm.world_size)
        self._tell_uploaded = tell_uploaded
        self._pace = None if upload_bytes_per_second is None else Pace(upload_bytes_per_second)
        self.claims = Claims(places, comm, timeout)
        self.sources = Sources(places, comm, timeout)
        self.cleaning = Cleaning(places, keep, self._pending, in_use)
        self._messages: Messages | None = None
        self._uploader: Uploader | None = None
        self.uploaded: int | None = None
        """On rank 0: the newest step that this life has uploaded from a faster tier."""
        _living.add(self)

    def open(self, token: str, found: int | None) -> int | None:
        """Make the faster tiers ready; all ranks. `token` is this life's, 16 hex digits.

        Returns, on rank 0, the newest step that is there in any tier; `found` is the persistent one's.
        """
        places, doing = self.places, "opening the tiers"
        if not places.are_several:
            return found
        places.open(self._comm, token)
        found = self.claims.compare(doing)
        store = self._comm.store()
        if store is None:
            self._messages = messages = Messages(places, token)
            store = StorageStore(places.persistent, messages.directory)
            if self._comm.rank == 0:
                try:
                    within(self._timeout, doing, messages.sweep)
                except DeadlineError as problem:
                    self._tell(f"{problem}")
                except CheckpointError as problem:
                    self._tell(f"messages of earlier jobs were not removed: {problem}")
        # The local disk first: what lies in memory is replaced while it is read.
        source = Overlay([tier.storage for tier in places.faster[::-1]])
        self._uploader = Uploader(
            source,
            places.persistent,
            self._comm,
            store,
            token,
            self._after_upload,
            self._released,
            self._leaders,
            lambda: self.claims.generation,
            self._pace,
        )
        return found

    @property
    def kept_images(self) -> KeptImages | None:
        """Where snapshots are committed in memory, after `open`; None where there is no such tier."""
        memory = self.places.memory
        return None if memory is None else KeptImages(memory, self.claims, self._messages)

    @property
    def site(self) -> Site | None:
        """The ranks that see where saves commit as this one does, None: all."""
        local = self.places.local
        return None if local is None else local.site

    @property
    def rendezvous(self) -> tuple[Storage, str] | None:
        """Where all ranks see the messages of a save, where they have no store; None: in the attempt's directory."""
        local = self.places.local
        if local is None or self._messages is None:
            return None
        return self._messages.rendezvous(local.storage, local.site)

    def committed(self, done: Committed) -> None:
        """After a commit in the first tier, on the first rank of each site: have it uploaded, delete what may go."""
        self.cleaning.newest = done.attempt
        local = self.places.local
        if local is not None:
            if self._uploader is not None and done.manifest is not None:
                if _is_gone(local.storage, done):
                    return  # newer ones have replaced it meanwhile
                holder = {record.name: rank for rank, record in enumerate(done.manifest.archives)}
                self._uploader.offer(Upload(done.directory, done.manifest, holder | {done.manifest.layout.name: 0}))
            self.claims.copy_to(local.storage, done.generation)
        self.cleaning.after_commit()

    def _after_upload(self, upload: Upload) -> None:
        persistent = self.places.persistent
        self.uploaded = upload.manifest.step
        _log.info("%s: step %s is uploaded", persistent.location(), self.uploaded)
        if self._tell_uploaded is not None:
            self._tell_uploaded(upload.manifest, persistent.location(upload.directory))
        try:
            self.cleaning.after_upload(upload.manifest.attempt)
        except CheckpointError as error:
            _log.warning("%s: cleaning up failed: %s", persistent.location(), error)

    @property
    def _leaders(self) -> list[int]:
        """The first rank of each node that has a disk of its own, without rank 0."""
        local = self.places.local
        return [] if local is None else [rank for rank in local.site.leaders if rank]

    def _released(self) -> None:
        """After an upload, on the other nodes: delete what had to wait for it, for no commit may follow that would."""
        try:
            self.cleaning.after_commit()
        except Exception as error:  # whatever it is, this rank does its part of the next upload
            _log.warning("%s: cleaning up failed: %s", self.places.first.location(), error)

    def _pending(self) -> set[str]:
        """Return the attempts that are still to be uploaded."""
        return set() if self._uploader is None else self._uploader.protected

    def restored(self, generation: int, step: int) -> None:
        """After a restore, on rank 0: have what was restored uploaded, where it is not in the persistent tier yet."""
        uploader, where = self._uploader, self.places.persistent.location()
        if uploader is None or self._comm.rank != 0:
            return
        entry, doing = Entry(step, generation, step_directory(step)), f"looking whether step {step} is in {where}"
        try:
            upload = within(self._timeout, doing, lambda: self.sources.to_upload(entry))
            if upload is not None:
                uploader.offer(upload)
        except CheckpointError as error:
            _log.warning("step %d was not uploaded to %s: %s", step, where, error)

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
            what = f"step {waiting.manifest.step} to {self.places.persistent.location()}"
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
                            f"step {waiting.manifest.step} is durable in {self.places.first.location()}, but is not in "
                            f"{self.places.persistent.location()}: {problem}. Started again with the same tiers, the "
                            "job uploads it"
                        )
                word = share(self._comm, word, error, timeout + 2 * _SLICE_SECONDS, "waiting for uploads")
        if self._comm.rank in self._leaders:
            # The word that it is over may still be on its way to the uploader, which ends now.
            uploader.release()
            doing = f"deleting old checkpoints in {self.places.first.location()}"
            try:
                within(self._timeout, doing, self._released)
            except DeadlineError as problem:
                self._tell(f"{problem}")

    def tell_kept(self) -> None:
        """Say where a checkpoint is that is in memory only, at the end of a job; on rank 0."""
        memory = self.places.memory
        if memory is None or self._comm.rank != 0:
            return
        with contextlib.suppress(CheckpointError):
            looking, kept = "looking where the last step is", newest(memory.storage)
            durable = within(self._timeout, looking, lambda: newest(self.places.first))
            if kept is None or (durable is not None and durable.order >= kept.order):
                return
            _log.warning(
                "step %s is in memory only, in %s, which a reboot empties: start the job again to upload it to %s",
                kept.step,
                memory.storage.location(),
                self.places.persistent.location(),
            )

    def close(self, *, done: bool, idle: bool = True) -> None:
        """End the moving, and give the memory back. `done`: the job has ended well; then nothing stays in memory.

        Without `idle` a save may still read what lies in memory: then it stays until the process ends. Does not wait
        for uploads: `flush` does.
        """
        self.stop()
        _living.discard(self)
        places, memory = self.places, self.places.memory
        try:
            if self._messages is not None and self._comm.rank == 0 and done:
                for storage in (places.persistent, places.first, *([] if memory is None else [memory.storage])):
                    remove = functools.partial(storage.delete_tree, self._messages.directory)
                    within(self._timeout, "removing messages", remove)
            if memory is not None and idle:
                memory.tier.close(remove=done)
                if done and memory.site.leads:
                    memory.tier.clear()
        except CheckpointError as error:
            self._tell(f"not all that the job leaves behind could be removed: {error}")

    def forget(self) -> None:
        """End for a Checkpointer that is gone and was never closed."""
        uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.stop(wait=False)
        if self.places.memory is not None:
            self.places.memory.tier.close(remove=False)

    def stop(self) -> None:
        """End the moving; nothing is waited for any more."""
        uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.stop()

    def end(self) -> None:
        """End the moving at the end of the interpreter, for a Checkpointer that was not closed."""
        waiting = None if self._uploader is None else self._uploader.pending()
        if waiting is not None:
            step, first = waiting.manifest.step, self.places.first.location()
            self._tell(f"step {step} is in {first} only: the next start uploads it here, and close() would have")
        self.stop()

    def abandon(self) -> None:
        """Forget the arenas and what is being uploaded, in a forked process: they are the parent's."""
        self._uploader = None
        self.cleaning.abandon()
        self.places.abandon()

    def _tell(self, problem: str) -> None:
        _log.warning("%s: %s", self.places.persistent.location(), problem)


_SLICE_SECONDS = 5.0
"""How often rank 0 tells the others, at the end of a job, that it still waits for uploads."""


def _is_gone(storage: Storage, done: Committed) -> bool:
    """Return whether a checkpoint is known to have been deleted; one failed look must not cost the upload."""
    with contextlib.suppress(StorageError):
        return storage.size(join(done.directory, manifest_name(done.generation))) is None
    return False


_living: Living[Tiers] = Living(forked=Tiers.abandon, ended=Tiers.end)
