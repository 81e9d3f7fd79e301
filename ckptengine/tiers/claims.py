"""A run's claims of generations, on their way between ranks and tiers: by them a tier tells whose it is."""

from __future__ import annotations

import base64
import json

from ckptengine.catalog.listing import MAX_CLAIM_NBYTES, claim_name, claimed_generations
from ckptengine.storage.base import StorageView

__all__ = ["claims_of", "packed", "unpacked"]


def claims_of(storage: StorageView) -> dict[int, bytes]:
    """Return the claim files of a storage, by generation; raises `StorageError`."""
    return {
        generation: storage.read_bytes(claim_name(generation), MAX_CLAIM_NBYTES)
        for generation in claimed_generations(storage)
    }


def packed(claims: dict[int, bytes]) -> bytes:
    """Return claims as they travel."""
    return json.dumps({generation: base64.b64encode(claim).decode() for generation, claim in claims.items()}).encode()


def unpacked(data: bytes) -> dict[int, bytes]:
    """Return what `packed` made."""
    return {int(generation): base64.b64decode(claim) for generation, claim in json.loads(data).items()}
