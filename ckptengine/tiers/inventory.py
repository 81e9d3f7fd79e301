"""What lies on the disks of other nodes, as far as a checkpoint is to be chosen by it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

from ckptengine.catalog.listing import attempt_of, claim_name, claimed_generations, step_directories
from ckptengine.catalog.manifest import MAX_MANIFEST_NBYTES
from ckptengine.comm.agree import gather, share
from ckptengine.comm.base import Communicator
from ckptengine.comm.site import Site
from ckptengine.errors import CheckpointError
from ckptengine.storage.base import StorageView, join
from ckptengine.tiers.overlay import Reported

__all__ = ["Inventory", "take_inventory"]

_Near = Sequence[tuple[StorageView, Site]]


class Inventory:
    """What other nodes have reported, on rank 0; empty elsewhere. `holder`: for each file a rank that can read it."""

    def __init__(self, reported: Reported | None = None, holder: dict[str, int] | None = None) -> None:
        self.reported = reported
        self.holder = holder or {}


def take_inventory(near: _Near, comm: Communicator, timeout: float) -> Inventory:
    """Return what the storages `near` hold that differ from node to node; all ranks call it with the same storages.

    The first rank of each node lists what is there; rank 0 then asks for the manifests and claims that it has not seen.
    Raises on all ranks what any of them found.
    """
    near = [(storage, site) for storage, site in near if not site.shared]
    if not near:
        return Inventory()
    error: Exception | None = None
    mine: dict[str, int] = {}
    try:
        for storage, site in near:
            if site.leads and site.rank != 0:
                mine |= _listing(storage)
    except CheckpointError as problem:
        error = problem
    doing = "listing the checkpoints of all nodes"
    listings = [json.loads(reply) for reply in gather(comm, json.dumps(mine).encode(), error, timeout, doing)]
    holder: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for rank, listing in enumerate(listings):
        for name, size in listing.items():
            if name not in holder:
                holder[name], sizes[name] = rank, size
    wanted: list[str] = []
    if comm.rank == 0:
        wanted = [name for name in holder if _is_small(name) and not any(view.size(name) for view, _ in near)]
    wanted = json.loads(share(comm, json.dumps(wanted).encode(), None, timeout, doing))
    sent: dict[str, str] = {}
    try:
        for name in wanted:
            if holder[name] == comm.rank:
                storage = next(view for view, _ in near if view.size(name) is not None)
                sent[name] = base64.b64encode(storage.read_bytes(name, MAX_MANIFEST_NBYTES)).decode()
    except (CheckpointError, StopIteration) as problem:
        error = (
            problem if isinstance(problem, CheckpointError) else CheckpointError("a file has gone while it was read")
        )
    replies = gather(comm, json.dumps(sent).encode(), error, timeout, doing)
    if comm.rank != 0:
        return Inventory()
    content = {name: base64.b64decode(data) for reply in replies for name, data in json.loads(reply).items()}
    files = {name: (size, content.get(name)) for name, size in sizes.items()}
    return Inventory(Reported(files, near[-1][0].location()), holder)


def _listing(storage: StorageView) -> dict[str, int]:
    """Return the sizes of claims, manifests and attempts' files, by name."""
    names = [claim_name(generation) for generation in claimed_generations(storage)]
    for _, directory in step_directories(storage):
        for name in storage.list(directory):
            path = join(directory, name)
            names += [join(path, file) for file in storage.list(path)] if attempt_of(name) else [path]
    return {name: size for name in names if (size := storage.size(name)) is not None}


def _is_small(name: str) -> bool:
    return name.rpartition("/")[2].startswith(("manifest-", "generation-"))
