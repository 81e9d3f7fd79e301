"""The places of a run that one rank sees: shared memory, the local disk, and its own place, the persistent tier."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptengine.catalog.listing import newest
from ckptengine.catalog.site import Site, find_sites
from ckptengine.comm.agree import on_all
from ckptengine.comm.base import Communicator
from ckptengine.storage.base import Storage
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.open import local_path, open_storage
from ckptengine.storage.within import within
from ckptengine.tiers.apart import check_apart
from ckptengine.tiers.memory import MemoryTier, memory_root
from ckptengine.tiers.overlay import Overlay

__all__ = ["FasterTier", "LocalTier", "MemoryNode", "Places"]


@dataclass(frozen=True, slots=True)
class LocalTier:
    """The local tier, opened, and the ranks that see it as this one does."""

    storage: LocalStorage
    site: Site


@dataclass(frozen=True, slots=True)
class MemoryNode:
    """The memory tier of this node, opened, and the ranks that see it as this one does."""

    tier: MemoryTier
    site: Site

    @property
    def storage(self) -> LocalStorage:
        """What reads it as any other run."""
        return self.tier.storage


FasterTier = LocalTier | MemoryNode


class Places:
    """Which tiers a run has. `persistent` is its own place, which all ranks see.

    `local` and `memory` are None before `open`, and where there is no such tier; `memory` also in a forked process.
    """

    def __init__(
        self,
        run: str,
        local: str | os.PathLike[str] | None,
        memory: bool | str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None,
        timeout: float,
    ) -> None:
        self.persistent = open_storage(run, storage_options, timeout)
        self._local = None if local is None else LocalStorage(local_path(local, "local"))
        self._memory_base, self._timeout = memory, timeout
        self.local: LocalTier | None = None
        self.memory: MemoryNode | None = None
        self.protocol = run.partition("://")[0] if "://" in run else "run"

    @property
    def names(self) -> list[str]:
        """What rules name the tiers, the fastest first; the last one is the persistent tier's."""
        return [*(["memory"] if self._memory_base else []), *([] if self._local is None else ["local"]), self.protocol]

    @property
    def first(self) -> Storage:
        """Where saves commit, after `open`: the local tier, or the persistent one where there is none."""
        return self.persistent if self.local is None else self.local.storage

    @property
    def faster(self) -> list[FasterTier]:
        """The tiers before the persistent one, the fastest first."""
        return [tier for tier in (self.memory, self.local) if tier is not None]

    @property
    def are_several(self) -> bool:
        """Whether there is a tier beside the persistent one."""
        return self._local is not None or bool(self._memory_base)

    def newest(self) -> int | None:
        """Return the newest step that this rank sees in any tier, None where there is none."""
        found = newest(Overlay([*(tier.storage for tier in self.faster), self.persistent]))
        return None if found is None else found.step

    def check_apart(self) -> None:
        """Raise `ValueError` where one of the run's places is, or lies in, another one of them."""
        places = {"run": str(self.persistent.root)} if isinstance(self.persistent, LocalStorage) else {}
        if self._local is not None:
            places["local"] = str(self._local.root)
        if self._memory_base:
            places["memory"] = self._memory_root()
        check_apart(places)

    def open(self, comm: Communicator, token: str) -> None:
        """Make the faster tiers ready, and see who shares them; all ranks. `token` is this life's, 16 hex digits."""
        doing = "opening the tiers"
        tiers: list[MemoryTier] = []

        def make() -> None:
            if self._local is not None:
                within(self._timeout, doing, self._local.create)
            if self._memory_base:
                tiers.append(MemoryTier(self._memory_root(), comm.rank))
                tiers[0].open()

        on_all(comm, make, self._timeout, doing)
        local = [] if self._local is None else [self._local]
        sites = find_sites([*(tier.storage for tier in tiers), *local], comm, token[:12], self._timeout)
        for tier in tiers:
            self.memory = MemoryNode(tier, sites[0])
        for storage in local:
            self.local = LocalTier(storage, sites[-1])

    def _memory_root(self) -> str:
        base = self._memory_base
        return memory_root(self.persistent.location(), True if isinstance(base, bool) else base)

    def abandon(self) -> None:
        """Forget the arenas in shared memory, in a forked process: they are the parent's."""
        if self.memory is not None:
            self.memory.tier.abandon()
            self.memory = None
