"""Where the ranks of a job without a key-value store leave each other messages: in a directory of the run's places."""

from __future__ import annotations

import re

from ckptengine.catalog.lease import is_old
from ckptengine.catalog.site import Site
from ckptengine.storage.base import Storage
from ckptengine.tiers.places import Places

__all__ = ["Messages"]

_MESSAGES = re.compile(r"moves-[0-9a-f]{16}")


class Messages:
    """A directory that lasts as long as one life of a run: an attempt's goes when a commit elsewhere has failed.

    `token` is the life's, 16 hex digits.
    """

    def __init__(self, places: Places, token: str) -> None:
        self._places, self.directory = places, f"moves-{token}"

    def rendezvous(self, storage: Storage, site: Site | None) -> tuple[Storage, str]:
        """Return where all ranks see the messages of a save that goes to a storage, which `site` sees."""
        return (self._places.persistent if site is None or not site.shared else storage), self.directory

    def sweep(self) -> None:
        """Remove what earlier jobs have left."""
        for storage in (self._places.persistent, *(tier.storage for tier in self._places.faster)):
            for name in filter(_MESSAGES.fullmatch, storage.list()):
                if name != self.directory and is_old(storage, name, storage.now()):
                    storage.delete_tree(name)
