"""What is deleted of a run's tiers after a commit and after an upload."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection

from ckptengine.catalog.keep import Keep, KeepRule
from ckptengine.catalog.retention import remove_leftovers, retain
from ckptengine.storage.base import Storage
from ckptengine.tiers.keep import rules_of
from ckptengine.tiers.places import Places

__all__ = ["Cleaning"]

_log = logging.getLogger("ckptengine")


class Cleaning:
    """Applies the rules of what each tier keeps; one thread at a time, which must not meet in one directory.

    Not deleted are the attempts that are `pending`, still to be uploaded, and those `in_use`. What this life has
    committed last, and has uploaded last, is known without reading, and stays. Raises `ValueError` for a `keep` that
    names a tier which is not there.
    """

    def __init__(
        self,
        places: Places,
        keep: Keep,
        pending: Callable[[], Collection[str]],
        in_use: Callable[[], Collection[str]],
    ) -> None:
        self._places, self._pending, self._in_use = places, pending, in_use
        names = places.names
        rules = {name: rules_of(keep, name, set(names)) for name in names}
        self._persistent_rules, self._first_rules = rules[names[-1]], rules.get("local", rules[names[-1]])
        self._cleaning = threading.Lock()
        self.newest = ""
        """The attempt that this life has committed last."""

    def after_commit(self) -> None:
        """Delete what may go of where saves commit."""
        self.clean(self._places.first, self._first_rules)

    def after_upload(self, uploaded: str) -> None:
        """Delete what may go in the persistent and the local tier, of which the attempt `uploaded` has come there."""
        self.clean(self._places.persistent, self._persistent_rules, uploaded)
        if self._places.local is not None:
            self.clean(self._places.local.storage, self._first_rules, uploaded)

    def clean(self, storage: Storage, rules: Collection[KeepRule], uploaded: str = "") -> None:
        """Delete what no rule of a tier keeps; the attempt `uploaded` is not to be uploaded any more."""
        with self._cleaning:
            self._tell(remove_leftovers(storage))
            if rules:
                newest = {self.newest, uploaded} if storage is self._places.persistent else {self.newest}
                pending = set(self._pending()) - {uploaded}
                self._tell(retain(storage, rules, pending | newest | set(self._in_use())))

    def abandon(self) -> None:
        """Forget who is at it, in a forked process."""
        self._cleaning = threading.Lock()

    def _tell(self, problems: list[str]) -> None:
        for problem in problems:
            _log.warning("%s: %s", self._places.persistent.location(), problem)
