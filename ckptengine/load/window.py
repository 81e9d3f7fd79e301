"""The memory through which the ranks of a node hand one another what one of them has read."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Sequence

import numpy as np

import ckptengine._native as _native
from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.archive.reader import Archive
from ckptengine.errors import DeadlineError
from ckptengine.load.node import Neighbour
from ckptengine.load.schedule import REQUEST_NBYTES, Request
from ckptengine.native.tables import ScatterPlan
from ckptengine.schema.ranks import name_ranks

__all__ = ["LOOK", "MOST_RANKS", "MOST_SLOTS", "StoppedElsewhere", "Window", "window_nbytes"]

MOST_SLOTS = 16
"""Slots of a window, of one request each: 64 MiB per node, enough to keep the device busy while ranks scatter."""

MOST_RANKS = 4096  # as in ckptengine.h
LOOK = 0.2
"""Seconds between looks at the other ranks' processes and at the deadline."""
_HEAD_WORDS = 8  # as in share.c


class StoppedElsewhere(Exception):
    """Another rank has stopped the window, and has an error that tells why."""


def window_nbytes(slots: int, ranks: int) -> int:
    """Return the bytes of a window for some ranks."""
    return _native.window_control(slots, ranks) + slots * REQUEST_NBYTES


class Window:
    """Shared memory, used by all of a node's ranks at the same time, each as number `rank` of `neighbours`.

    Every wait ends with what was waited for or with an exception: `StoppedElsewhere`, or a `DeadlineError` that names
    the ranks that have ended, or that have not come forward for `timeout` seconds in which nobody has. The memory is
    given back with the last reference: a thread that a read holds for ever must not find another's there.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        slots: int,
        neighbours: Sequence[Neighbour],
        rank: int,
        requests: Sequence[Request],
        timeout: float,
    ) -> None:
        self._memory = memory
        self._slots, self._rank = slots, rank
        self._neighbours, self._requests, self._timeout = neighbours, requests, timeout
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.ranks = ranks = len(neighbours)
        self._slots_address = address + _native.window_control(slots, ranks)
        self._table = np.array([address, window_nbytes(slots, ranks), slots, REQUEST_NBYTES, ranks, rank], np.int64)
        words = np.frombuffer(memory, np.uint64, slots * (1 + ranks), _HEAD_WORDS * 8)
        self._filled, self._done = words[:slots], words[slots:].reshape(slots, ranks)
        self._seen, self._changed = -1, time.monotonic()

    def slot(self, request: Request) -> int:
        """Return the address of a request's slot."""
        return self._slots_address + request.number % self._slots * REQUEST_NBYTES

    def await_slot(self, request: Request) -> None:
        """Return when the slot of a request is free."""
        before = request.number - self._slots
        consumers = np.array(self._requests[before].consumers if before >= 0 else (), np.int64)
        while (outcome := _native.share_wait(self._table, request.number, consumers, LOOK)) != _native.READY:
            self._go_on(outcome)

    def publish(self, request: Request) -> None:
        """Hand a request, whose verified bytes lie in its slot, to its consumers."""
        _native.share_publish(self._table, request.number)

    def consume(
        self,
        archive: Archive,
        requests: Sequence[Request],
        plan: ScatterPlan,
        threads: int,
    ) -> None:
        """Scatter requests of one archive, which this rank consumes, to memory."""
        rows = np.array([(one.number, one.position, one.nbytes) for one in requests], np.int64)
        while (
            outcome := _native.share_consume(
                self._table,
                rows,
                archive.fixed_nbytes,
                BLOCK_NBYTES,
                archive.checksums,
                plan.ops,
                plan.index,
                threads,
                LOOK,
            )
        ) != _native.READY:
            self._go_on(outcome)

    @property
    def left(self) -> float:
        """Seconds until `timeout` of them have passed in which no rank has come forward."""
        return max(0.0, self._changed + self._timeout - time.monotonic())

    def stop(self) -> None:
        """End all waits on all ranks."""
        _native.share_stop(self._table)

    def check(self) -> None:
        """Raise where a wait is in vain."""
        ended = [one.rank for one in self._neighbours if one.ended()]
        if ended:
            self._fail(f"{name_ranks(ended)} ended in a read that the ranks of this node share")
        seen, now = int(self._filled.sum() + self._done.sum()), time.monotonic()
        if seen != self._seen:
            self._seen, self._changed = seen, now
        elif now - self._changed > self._timeout:
            late = name_ranks(self._neighbours[rank].rank for rank in self._late())
            self._fail(f"{late} did not come forward within {self._timeout:g} s in a read that this node's ranks share")

    def _go_on(self, outcome: int) -> None:
        if outcome == _native.STOPPED:
            raise StoppedElsewhere
        self.check()

    def _fail(self, message: str) -> None:
        self.stop()
        raise DeadlineError(message)

    def _late(self) -> list[int]:
        """Return the ranks for which the first request that isn't done waits: its reader, or consumers."""
        for request in self._requests:
            slot, number = request.number % self._slots, request.number + 1
            # All before it are done, so that its slot is free.
            if self._filled[slot] < number:
                return [request.reader]
            late = [rank for rank in request.consumers if self._done[slot, rank] < number]
            if late:
                return late
        return []
