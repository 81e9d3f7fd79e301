"""A run's claims of generations, which each of its tiers holds: by them a tier tells whose it is."""

from __future__ import annotations

import base64
import contextlib
import json
import logging

from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.listing import claim_name, claims_of
from ckptengine.catalog.retention import remove_leftovers
from ckptengine.comm.agree import from_first, on_all
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError
from ckptengine.storage.base import Storage
from ckptengine.storage.within import within
from ckptengine.tiers.copy import check_same_run
from ckptengine.tiers.places import LocalTier, Places

__all__ = ["Claims"]

_log = logging.getLogger("ckptengine")


class Claims:
    """The claims of one run, in all its places. `generation` is, on rank 0, the newest that this life knows of."""

    def __init__(self, places: Places, comm: Communicator, timeout: float) -> None:
        self._places, self._comm, self._timeout = places, comm, timeout
        self.generation = 0  # claimed by this life or found; a later one is another job's
        self._copied: set[tuple[str, int]] = set()  # places of this node, and the generations whose claims they have

    def compare(self, doing: str) -> int | None:
        """Tell a tier of another run by its claims; what lies in memory of one is removed. All ranks.

        Returns, on rank 0, the newest step that is there in any tier.
        """
        places, found = self._places, None

        def read() -> bytes:
            claims = within(self._timeout, doing, lambda: claims_of(places.persistent))
            self.generation = max(claims, default=0)
            return _packed(claims)

        claims = _unpacked(from_first(self._comm, read, self._timeout, doing))

        def compare() -> None:
            nonlocal found
            # The disk first: where it is refused, what lies in memory may be needed yet.
            local, memory = places.local, places.memory
            if local is not None and local.site.leads:
                within(self._timeout, doing, lambda: self._begin_local(local, claims))
            if memory is not None and memory.site.leads and memory.tier.note_claims(claims):
                _log.warning(
                    "%s held checkpoints of an earlier run with this name; they were deleted", memory.storage.location()
                )
            if self._comm.rank == 0:
                found = within(self._timeout, doing, places.newest)

        on_all(self._comm, compare, self._timeout, doing)
        return found

    def _begin_local(self, local: LocalTier, claims: dict[int, bytes]) -> None:
        """Check that the local tier is this run's, give it the claims that it lacks, and sweep it."""
        persistent, storage = self._places.persistent, local.storage
        check_same_run(persistent, storage)
        for generation, claim in claims.items():
            if storage.size(claim_name(generation)) is None:
                storage.put_if_absent(claim_name(generation), claim)
        if local.site.shared:
            for problem in remove_leftovers(storage):
                _log.warning("%s: %s", persistent.location(), problem)

    def claim(self, parent: tuple[int, int] | None) -> int:
        """Claim the next generation in all tiers, on rank 0; a store that can't be reached gets its claim later."""
        places = self._places
        faster, local = [tier.storage for tier in places.faster], places.local
        self.generation = claim_generation(places.persistent, parent, faster, None if local is None else local.storage)
        return self.generation

    def copy_to(self, storage: Storage, generation: int) -> None:
        """Give a tier of this node the run's claims, once in a life: by them the next one knows whose it is."""
        key = storage.location(), generation
        if self._comm.rank == 0 or key in self._copied:  # rank 0 has claimed there
            return
        with contextlib.suppress(CheckpointError):
            claims = claims_of(self._places.persistent)
            for number, claim in claims.items():
                storage.put_if_absent(claim_name(number), claim)
            if generation in claims:
                self._copied.add(key)


def _packed(claims: dict[int, bytes]) -> bytes:
    """Return claims as they travel."""
    return json.dumps({generation: base64.b64encode(claim).decode() for generation, claim in claims.items()}).encode()


def _unpacked(data: bytes) -> dict[int, bytes]:
    """Return what `_packed` made."""
    return {int(generation): base64.b64decode(claim) for generation, claim in json.loads(data).items()}
