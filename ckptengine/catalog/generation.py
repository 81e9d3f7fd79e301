"""Claiming the number of a run's next life."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from collections.abc import Sequence

from ckptengine.catalog.listing import claim_name, next_generation
from ckptengine.catalog.manifest import FORMAT_VERSION, utc_now
from ckptengine.errors import StorageError
from ckptengine.storage.base import Storage

__all__ = ["claim_generation"]

_MAX_TRIES = 1000

_log = logging.getLogger("ckptengine")


def claim_generation(storage: Storage, parent: tuple[int, int] | None, others: Sequence[Storage] = ()) -> int:
    """Claim the next generation of a run and return its number; two claimers never get the same.

    `parent` is the (generation, step) that this life was restored from, None for a fresh start. `others` hold copies of
    the run: the number is new there too, and they get the same claim, where they can be written to. Raises
    `StorageError`.
    """
    for _ in range(_MAX_TRIES):
        generation = max(map(next_generation, (storage, *others)))
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
        document = json.dumps(claim, sort_keys=True).encode()
        if storage.put_if_absent(claim_name(generation), document):
            for other in others:
                try:
                    other.put_if_absent(claim_name(generation), document)
                except StorageError as error:  # it can be copied later; the number is taken
                    _log.warning("generation %d is not noted in %s: %s", generation, other.location(), error)
            return generation
    raise StorageError(
        None,
        f"{storage.location()}: no generation could be claimed in {_MAX_TRIES} tries: do others open it?",
    )
