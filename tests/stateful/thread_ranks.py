"""A job whose ranks are threads of this process: as many as wanted, started at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ckptengine.comm.exchange import StoreCommunicator
from ckptengine.comm.keyvalue import MemoryStore

_T = TypeVar("_T")
_prefixes = itertools.count()


class Ranks:
    """One start of a job. `run` has every rank do something and returns what each returned."""

    def __init__(self, world_size: int) -> None:
        store, prefix = MemoryStore(), f"job-{next(_prefixes)}"
        self.comms = [StoreCommunicator(store, rank, world_size, prefix, store) for rank in range(world_size)]
        self._pool = ThreadPoolExecutor(world_size)

    def run(self, call: Callable[[int], _T]) -> list[_T]:
        """Call with each rank, all at once; raises what the first rank that failed raised, when all have ended."""
        futures = [self._pool.submit(call, rank) for rank in range(len(self.comms))]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]

    def end(self) -> None:
        """Let the threads go."""
        self._pool.shutdown()
