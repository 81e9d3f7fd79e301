"""A few entries that need nothing but torch, for `make test`."""

from __future__ import annotations

from catalogue import of_torch
from entry import Entry

__all__ = ["catalogue"]

NAMES = ("AdamW", "LBFGS", "Muon", "SGD", "OneCycleLR", "AveragedModel (EMA)")


def catalogue() -> list[Entry]:
    """Return the entries of these names."""
    return [entry for entry in of_torch() if entry.name in NAMES]
