"""Claiming the number of a run's next life."""

from __future__ import annotations

import json
import os
import secrets
import socket

from ckptengine.catalog.listing import claim_name, next_generation
from ckptengine.catalog.manifest import FORMAT_VERSION, utc_now
from ckptengine.errors import StorageError
from ckptengine.storage.base import Storage

__all__ = ["claim_generation"]

_MAX_TRIES = 1000


def claim_generation(storage: Storage, parent: tuple[int, int] | None) -> int:
    """Claim the next generation of a run and return its number; two claimers never get the same.

    `parent` is the (generation, step) that this life was restored from, None for a fresh start. Raises
    `StorageError`.
    """
    for _ in range(_MAX_TRIES):
        generation = next_generation(storage)
        claim = {
            "format_version": FORMAT_VERSION,
            "generation": generation,
            "parent": None if parent is None else list(parent),
            "created": utc_now(),
            # A claim is nobody else's: after a lost reply it is told by its bytes.
            "id": secrets.token_hex(8),
            # For people who wonder whose life it was.
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        if storage.put_if_absent(claim_name(generation), json.dumps(claim, sort_keys=True).encode()):
            return generation
    raise StorageError(
        None,
        f"{storage.location()}: no generation could be claimed in {_MAX_TRIES} tries: do others open it?",
    )
