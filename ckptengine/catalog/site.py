"""Which ranks see the same directory: all of them on a shared file system, those of one node on its own disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ckptengine.comm.agree import from_all
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError
from ckptengine.storage.base import Storage
from ckptengine.storage.within import within

__all__ = ["Site", "find_sites"]


@dataclass(frozen=True, slots=True)
class Site:
    """The ranks, ascending, that see what rank `rank` sees under one name; `leaders` are the first of each site."""

    rank: int
    ranks: tuple[int, ...]
    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this rank acts for its site."""
        return self.rank == self.ranks[0]

    @property
    def shared(self) -> bool:
        """Whether all ranks see the same."""
        return len(self.leaders) == 1


def find_sites(storages: Sequence[Storage], comm: Communicator, token: str, timeout: float) -> list[Site]:
    """Return for each storage the ranks that see the same; all ranks call it, with a `token` of 12 hex digits.

    On each storage the first rank to come leaves its number, and all tell whose they found. The storages' roots must
    be there. Raises `StorageError`, `RankFailedError`, `DeadlineError`.
    """
    if not storages:
        return []
    name = f".tmp-site.{token}"
    made: list[Storage] = []
    doing = "looking for the ranks that share a disk"

    def look() -> bytes:
        numbers: list[int] = []
        for storage in storages:
            if storage.put_if_absent(name, json.dumps(comm.rank).encode()):
                made.append(storage)
            numbers.append(int(json.loads(storage.read_bytes(name, 32))))
        return json.dumps(numbers).encode()

    def tidy() -> None:
        for storage in made:
            with contextlib.suppress(CheckpointError):
                storage.delete(name, durable=False)

    try:
        replies = from_all(comm, lambda: within(timeout, doing, look), timeout, doing)
    finally:
        if made:
            with contextlib.suppress(DeadlineError):  # swept later
                within(timeout, doing, tidy)
    all_found = [json.loads(reply) for reply in replies]
    sites = []
    for place, mine in enumerate(all_found[comm.rank]):
        firsts: dict[int, int] = {}
        for rank, numbers in enumerate(all_found):
            firsts.setdefault(numbers[place], rank)
        ranks = tuple(rank for rank, numbers in enumerate(all_found) if numbers[place] == mine)
        sites.append(Site(comm.rank, ranks, tuple(firsts.values())))
    return sites
