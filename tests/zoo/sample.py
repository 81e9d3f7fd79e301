"""A few entries that need nothing but torch, and those that are known to be at fault, for `make test`."""

from __future__ import annotations

import broken
from catalogue import of_torch
from entry import Entry

__all__ = ["catalogue"]

NAMES = ("AdamW", "SGD", "OneCycleLR", "AveragedModel (EMA)")


def catalogue() -> list[Entry]:
    """Return the entries of these names, and the broken ones."""
    return [*(entry for entry in of_torch() if entry.name in NAMES), *broken.catalogue()]
