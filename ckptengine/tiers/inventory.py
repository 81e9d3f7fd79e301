"""What lies on the disks of other nodes, as far as a checkpoint is to be chosen by it."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterable, Sequence

from ckptengine.catalog.listing import attempt_of, claim_name, claimed_generations, step_directories
from ckptengine.catalog.manifest import MAX_MANIFEST_NBYTES
from ckptengine.catalog.site import Site
from ckptengine.comm.agree import from_all, from_first
from ckptengine.comm.base import Communicator
from ckptengine.storage.base import StorageView, join
from ckptengine.storage.within import within
from ckptengine.tiers.overlay import Reported

__all__ = ["Inventory", "take_inventory"]

_Faster = Sequence[tuple[StorageView, Site]]


class Inventory:
    """What other nodes have reported of each tier, on rank 0; empty elsewhere.

    `reported` has a view for each tier, the fastest first; `holders` for each a rank that can read a file, by its name.
    """

    def __init__(self, reported: Sequence[Reported] = (), holders: Sequence[dict[str, int]] = ()) -> None:
        self.reported, self._holders = tuple(reported), tuple(holders)

    def holder(self, name: str, skipped: int) -> int:
        """Return a rank that has a file in a tier from number `skipped` on; 0 where none has."""
        return next((holder[name] for holder in self._holders[skipped:] if name in holder), 0)


def take_inventory(faster: _Faster, comm: Communicator, timeout: float) -> Inventory:
    """Return what the storages `faster` hold that differ from node to node; all ranks call it with the same storages.

    The first rank of each node lists what is there; rank 0 then asks for the manifests and claims that it has not seen.
    Raises on all ranks what any of them found.
    """
    if all(site.shared for _, site in faster):
        return Inventory()
    doing = "listing the checkpoints of all nodes"

    def listed() -> bytes:
        mine: list[dict[str, int]] = [{} for _ in faster]
        for tier, (storage, site) in enumerate(faster):
            if not site.shared and site.leads and site.rank != 0:
                mine[tier] = within(timeout, doing, functools.partial(_listing, storage))
        return json.dumps(mine).encode()

    listings = [json.loads(reply) for reply in from_all(comm, listed, timeout, doing)]
    holders: list[dict[str, int]] = [{} for _ in faster]
    sizes: list[dict[str, int]] = [{} for _ in faster]
    for rank, listing in enumerate(listings):
        for tier, files in enumerate(listing):
            for name, size in files.items():
                if name not in holders[tier]:
                    holders[tier][name], sizes[tier][name] = rank, size

    def lacking() -> bytes:
        pairs = [(storage, holder) for (storage, _), holder in zip(faster, holders, strict=True)]
        names = within(timeout, doing, lambda: [_lacking(storage, holder) for storage, holder in pairs])
        return json.dumps(names).encode()

    wanted = json.loads(from_first(comm, lacking, timeout, doing))

    def read() -> bytes:
        sent: list[dict[str, str]] = [{} for _ in faster]
        for tier, names in enumerate(wanted):
            for name in names:
                if holders[tier][name] == comm.rank:
                    one = functools.partial(faster[tier][0].read_bytes, name, MAX_MANIFEST_NBYTES)
                    sent[tier][name] = base64.b64encode(within(timeout, doing, one)).decode()
        return json.dumps(sent).encode()

    replies = [json.loads(reply) for reply in from_all(comm, read, timeout, doing)]
    if comm.rank != 0:
        return Inventory()
    reported = []
    for tier, (storage, _) in enumerate(faster):
        content = {name: base64.b64decode(data) for reply in replies for name, data in reply[tier].items()}
        files = {name: (size, content.get(name)) for name, size in sizes[tier].items()}
        reported.append(Reported(files, storage.location()))
    return Inventory(reported, holders)


def _listing(storage: StorageView) -> dict[str, int]:
    """Return the sizes of claims, manifests and attempts' files, by name."""
    names = [claim_name(generation) for generation in claimed_generations(storage)]
    for _, directory in step_directories(storage):
        for name in storage.list(directory):
            path = join(directory, name)
            names += [join(path, file) for file in storage.list(path)] if attempt_of(name) else [path]
    return {name: size for name in names if (size := storage.size(name)) is not None}


def _lacking(storage: StorageView, names: Iterable[str]) -> list[str]:
    """Return which manifests and claims of these names a storage lacks."""
    return [name for name in names if _is_small(name) and storage.size(name) is None]


def _is_small(name: str) -> bool:
    return name.rpartition("/")[2].startswith(("manifest-", "generation-"))
