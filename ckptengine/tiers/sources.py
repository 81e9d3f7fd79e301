"""What the tiers hold of earlier lives: read as one, and uploaded where only single nodes have it."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Sequence

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.lease import Lease
from ckptengine.catalog.listing import Entry, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.comm.agree import from_first, on_all
from ckptengine.comm.base import Communicator
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.storage.base import StorageView, join
from ckptengine.storage.within import within
from ckptengine.tiers.copy import copy_commit
from ckptengine.tiers.inventory import Inventory, take_inventory
from ckptengine.tiers.overlay import Overlay
from ckptengine.tiers.places import FasterTier, Places
from ckptengine.tiers.uploader import Upload, UploadPart, upload_part

__all__ = ["Sources"]

_log = logging.getLogger("ckptengine")


class Sources:
    """Where a restore looks, and what it has to upload before all ranks can read it."""

    def __init__(self, places: Places, comm: Communicator, timeout: float) -> None:
        self._places, self._comm, self._timeout = places, comm, timeout
        self._inventory = Inventory()
        self._views: list[StorageView] = [places.persistent]

    def views(self) -> list[StorageView]:
        """Return where to look for a checkpoint: all tiers, then without the fastest, and so on; all ranks."""
        places = self._places
        faster = [tier.storage for tier in places.faster]
        if not faster:
            return [places.persistent]
        self._inventory = take_inventory(
            [(tier.storage, tier.site) for tier in places.faster], self._comm, self._timeout
        )
        reported = self._inventory.reported
        self._views = [
            Overlay([*faster[number:], places.persistent, *reported[number:]]) for number in range(len(faster))
        ]
        self._views.append(places.persistent)
        return self._views

    def upload_for_all(self, checkpoint: Checkpoint) -> None:
        """Upload a checkpoint that only single nodes have, so that every rank can read all of it; all ranks."""
        persistent = self._places.persistent
        # What lies in a faster tier than those of its view may be damaged.
        skipped = next(number for number, view in enumerate(self._views) if view is checkpoint.storage)
        faster = self._places.faster[skipped:]
        if all(tier.site.shared for tier in faster):
            return
        doing = f"bringing {checkpoint.directory} to {persistent.location()}"
        begun: list[Upload] = []  # on rank 0, what is uploaded
        with contextlib.ExitStack() as held:

            def begin() -> bytes:
                upload = within(self._timeout, doing, lambda: self._needed(checkpoint, faster, skipped))
                if upload is None:
                    return json.dumps([]).encode()
                begun.append(upload)
                lease = Lease(persistent, upload.data)
                within(self._timeout, doing, lease.__enter__)
                held.callback(within, self._timeout, doing, lambda: lease.__exit__(None, None, None))
                return json.dumps([one.encode().decode() for one in upload.shares(self._comm.world_size)]).encode()

            shares = json.loads(from_first(self._comm, begin, self._timeout, doing))
            if not shares:
                return

            def copy() -> None:
                own = UploadPart.decode(shares[self._comm.rank].encode())
                source = Overlay([tier.storage for tier in faster])
                pieces: list[int] = []
                one = functools.partial(upload_part, own, source, persistent, progress=pieces.append)
                within(self._timeout, doing, one, lambda: len(pieces))

            on_all(self._comm, copy, self._timeout, doing)

            def commit() -> bytes:
                for upload in begun:
                    one = functools.partial(
                        copy_commit, checkpoint.storage, persistent, upload.directory, upload.manifest
                    )
                    within(self._timeout, doing, one)
                return b""

            from_first(self._comm, commit, self._timeout, doing)
        if isinstance(checkpoint.storage, Overlay):
            checkpoint.storage.forget()

    def _needed(self, checkpoint: Checkpoint, faster: Sequence[FasterTier], skipped: int) -> Upload | None:
        """Return what has to be uploaded of a checkpoint, None where all ranks can read it as it is."""
        manifest = checkpoint.manifest
        name = Entry(manifest.step, manifest.generation, checkpoint.directory).manifest
        shared = [tier.storage for tier in faster if tier.site.shared]
        if any(storage.size(name) is not None for storage in (*shared, self._places.persistent)):
            return None
        return self._upload(checkpoint.directory, manifest, skipped)

    def to_upload(self, entry: Entry) -> Upload | None:
        """Return what was restored from a faster tier and is not in the persistent one, None for nothing."""
        persistent, faster = self._places.persistent, Overlay([tier.storage for tier in self._places.faster])
        if faster.size(entry.manifest) is None or persistent.size(entry.manifest) is not None:
            return None
        if not persistent.list():
            _log.warning(
                "%s is empty, but step %s was found in %s: the run continues from there. To start over, delete both",
                persistent.location(),
                entry.step,
                faster.location(),
            )
        return self._upload(entry.directory, read_manifest(faster, entry))

    def _upload(self, directory: str, manifest: Manifest, skipped: int = 0) -> Upload:
        """Return how the ranks share the upload of a checkpoint of an earlier life."""
        data, holder = attempt_directory(directory, manifest.attempt), {}
        for number, record in enumerate((*manifest.archives, manifest.layout)):
            name, faster = join(data, record.name), self._places.faster[skipped:]
            site = next((tier.site for tier in faster if tier.storage.size(name) is not None), None)
            if site is not None:
                holder[record.name] = site.ranks[number % len(site.ranks)]
            else:
                holder[record.name] = self._inventory.holder(name, skipped)
        return Upload(directory, manifest, holder)
