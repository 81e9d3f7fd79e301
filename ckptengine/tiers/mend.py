"""Making two places of one run agree again on who has claimed its generations."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from typing import Any

from ckptengine.catalog.listing import claim_name as name_of
from ckptengine.catalog.listing import claims_of, committed, read_claim, read_manifest
from ckptengine.errors import StorageError
from ckptengine.storage.base import Storage

__all__ = ["is_split", "mend"]

_SAME = ("generation", "parent", "host", "pid")


def is_split(one: bytes, other: bytes) -> bool:
    """Return whether two different claims of a number were made by one process for one life of a run.

    Older versions made a second one on the local disk where the first had failed after it had come to be.
    """
    mine, theirs = _fields(one), _fields(other)
    return one != other and mine is not None and mine == theirs


def mend(places: Sequence[Storage]) -> list[str]:
    """Give all places of a run the same claims, where one life made several of a generation; return what was changed.

    No job may be writing to the run. Of the claims of a number the one made last stays, whichever place is looked at
    first: so places of several nodes can be mended one after the other.

    Raises `StorageError` (EEXIST) where the claims are of different processes, or two attempts have committed the same
    step: then these are two runs. `CheckpointDamagedError` where a claim can't be read.
    """
    claims = [claims_of(place) for place in places]
    winners: dict[int, bytes] = {}
    for generation in sorted(set().union(*claims)):
        found = {claim[generation] for claim in claims if generation in claim}
        if len(found) == 1:
            continue
        for place, claim in zip(places, claims, strict=True):
            if generation in claim:
                read_claim(place, generation)
        first, *others = sorted(found)
        if not all(is_split(first, other) for other in others):
            where = " and ".join(place.location() for place in places)
            raise StorageError(
                errno.EEXIST,
                f"{where} hold two runs: generation {generation} was claimed by different jobs; give each a place of "
                "its own",
            )
        winners[generation] = max(found, key=lambda claim: (str(json.loads(claim).get("created")), claim))
    _check_steps(places, set(winners))
    changed = []
    for place, claim in zip(places, claims, strict=True):
        for generation, winner in winners.items():
            if claim.get(generation, winner) != winner:
                place.write_bytes(name_of(generation), winner)
                changed.append(f"{place.location(name_of(generation))} is now the claim that the other place has")
    return changed


def _check_steps(places: Sequence[Storage], generations: set[int]) -> None:
    """Raise where two attempts have committed the same step of a generation, each in a place."""
    known: dict[tuple[int, int], tuple[str, str]] = {}
    for place in places:
        for entry in committed(place):
            if entry.generation in generations:
                attempt, where = read_manifest(place, entry).attempt, place.location(entry.manifest)
                other = known.setdefault(entry.order, (attempt, where))
                if other[0] != attempt:
                    raise StorageError(
                        errno.EEXIST, f"{where} and {other[1]} are different checkpoints: these are two runs"
                    )


def _fields(claim: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(claim)
        return {name: document[name] for name in _SAME}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
