"""All entries of the zoo that the installed packages allow."""

from __future__ import annotations

import entries_around
import entries_torch
from entry import Entry

__all__ = ["catalogue", "of_torch"]


def of_torch() -> list[Entry]:
    """Return the entries that need nothing but torch."""
    return [
        *entries_torch.optimizers(),
        *entries_torch.schedulers(),
        *entries_around.wrappers(),
        *entries_around.layers(),
    ]


def catalogue() -> list[Entry]:
    """Return all entries, in the order of the table; imports the packages of requirements-zoo.txt."""
    import entries_collection
    import entries_more
    import entries_packages

    return [*of_torch(), *entries_collection.entries(), *entries_more.entries(), *entries_packages.entries()]
