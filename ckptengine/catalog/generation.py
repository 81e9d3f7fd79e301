"""Claiming the number of a run's next life."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from collections.abc import Sequence

from ckptengine.catalog.listing import MAX_CLAIM_NBYTES, claim_name, next_generation
from ckptengine.catalog.manifest import FORMAT_VERSION, utc_now
from ckptengine.errors import StorageError
from ckptengine.storage.base import Storage

__all__ = ["claim_generation"]

_MAX_TRIES = 1000

_log = logging.getLogger("ckptengine")


def claim_generation(
    storage: Storage, parent: tuple[int, int] | None, others: Sequence[Storage] = (), instead: Storage | None = None
) -> int:
    """Claim the next generation of a run and return its number; two claimers never get the same.

    `parent` is the (generation, step) that this life was restored from, None for a fresh start. `others` hold copies of
    the run: the number is new there too, and they get the same claim, where they can be written to. `instead` is the
    one of them that decides where `storage` can't be reached; without it that raises `StorageError`.

    A claim that failed may have come to be, or come to be later. So it is read back, and where that tells nothing,
    `instead` gets the very same one: one life never makes two claims of a number.
    """
    for _ in range(_MAX_TRIES):
        decides = storage
        try:
            generation = max(map(next_generation, (storage, *others)))
        except StorageError as error:
            if instead is None:
                raise
            _tell_unreached(storage, instead, error)
            decides, generation = instead, max(map(next_generation, others))
        document = _claim_of(generation, parent)
        try:
            won = _put(decides, generation, document)
        except StorageError as error:
            if instead is None or decides is instead:
                raise
            _tell_unreached(storage, instead, error)
            decides, won = instead, _put(instead, generation, document)
        if won:
            for other in others:
                if other is not decides:
                    _note(other, generation, document)
            return generation
    raise StorageError(
        None,
        f"{storage.location()}: no generation could be claimed in {_MAX_TRIES} tries: are other jobs opening the run?",
    )


def _claim_of(generation: int, parent: tuple[int, int] | None) -> bytes:
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
    return json.dumps(claim, sort_keys=True).encode()


def _put(storage: Storage, generation: int, document: bytes) -> bool:
    """Return whether a claim is ours, also where the storage failed after it had come to be.

    Raises `StorageError` where that is not known, or it is known to have failed.
    """
    name = claim_name(generation)
    try:
        return storage.put_if_absent(name, document)
    except StorageError as error:
        try:
            found = storage.read_bytes(name, MAX_CLAIM_NBYTES)
        except StorageError:
            raise error from None
        if found == document:
            _log.warning(
                "%s: the claim of generation %d was made, although the store reported a failure: %s",
                storage.location(),
                generation,
                error,
            )
        return found == document


def _note(other: Storage, generation: int, document: bytes) -> None:
    try:
        other.put_if_absent(claim_name(generation), document)
    except StorageError as error:  # it can be copied later; the number is taken
        _log.warning("generation %d could not be written to %s: %s", generation, other.location(), error)


def _tell_unreached(storage: Storage, instead: Storage, error: StorageError) -> None:
    _log.warning("%s: not reachable, the run continues in %s: %s", storage.location(), instead.location(), error)
