"""From the files into memory: which bytes to read, and where each goes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptengine._native as _native
from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.archive.reader import Archive
from ckptengine.errors import DeadlineError
from ckptengine.layout.read_plan import Copy, WantedPart, blocks, plan_read
from ckptengine.layout.tiling import Int64s
from ckptengine.load.checkpoint import Opened
from ckptengine.load.schedule import needed_nbytes
from ckptengine.native.tables import ScatterPlan, scatter_row
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, DeviceMemory, HostMemory
from ckptengine.storage.stuck import operation_of
from ckptengine.storage.within import within

__all__ = ["READ_TIMEOUT", "Filling", "Source", "host_memory", "plan_filling", "read_ranges"]


READ_TIMEOUT = 600.0
"""Seconds without a byte after which a read is given up, where the caller has no other number."""


@dataclass(frozen=True, slots=True)
class Source:
    """An archive that this rank needs, opened, and where its bytes go."""

    archive: Archive
    plan: ScatterPlan


@dataclass(frozen=True, slots=True)
class Filling:
    """How this rank's parts of leaves are filled: its archives by number, and the ranges that it needs of them.

    `needs` are int64 rows of archive, start and stop, ascending. `finish` is called when all is read: it brings what
    was read for devices there. `memories` keep what is filled where it is.
    """

    sources: dict[int, Source]
    needs: Int64s
    finish: Callable[[], None]
    memories: tuple[HostMemory, ...]


def host_memory(array: NDArray[Any]) -> HostMemory:
    """Return a numpy array's memory; the array must be contiguous."""
    return HostMemory(array.ctypes.data, array.strides, array.ctypes.data, array.nbytes, array)


def plan_filling(checkpoint: Opened, reads: Sequence[tuple[int, ArrayLeaf]]) -> Filling:
    """Return how to fill this rank's parts of leaves from a checkpoint.

    `reads` are pairs of a leaf's number in the checkpoint's rows and the leaf of the state that it fills. Raises
    `CheckpointDamagedError` naming the leaf that the layout does not cover, or the archive whose tail is damaged.
    """
    wanted: list[WantedPart] = []
    memories: list[HostMemory] = []
    copies_to_devices: list[Callable[[], None]] = []
    for leaf, target in reads:
        dtype = DTYPES[target.dtype].numpy
        for part in target.parts:
            memory = part.memory
            if isinstance(memory, DeviceMemory):
                staging = np.empty(part.box.shape, dtype)
                copies_to_devices.append(functools.partial(memory.copy_from_host, staging))
                memory = host_memory(staging)
            wanted.append(WantedPart(leaf, part.box))
            memories.append(memory)
    sources = {}
    needs = [np.zeros((0, 3), np.int64)]
    for number, copies in sorted(plan_read(checkpoint.rows, wanted).items()):
        archive = checkpoint.archive(number)
        spans = blocks(copies, BLOCK_NBYTES, archive.fixed_nbytes)
        needs.append(np.insert(spans, 0, number, axis=1))
        sources[number] = Source(archive, _scatter(copies, memories))

    def finish() -> None:
        for copy in copies_to_devices:
            copy()

    return Filling(sources, np.concatenate(needs), finish, tuple(memories))


def read_ranges(filling: Filling, ranges: Int64s, timeout: float) -> int:
    """Read ranges, rows as those of `needs` and parts of them, for this rank alone; return their bytes.

    Every byte is verified before it is used. Raises `CheckpointDamagedError` naming the file and the place, and
    `DeadlineError` naming the file where nothing has come of it for `timeout` seconds; some parts may then have been
    filled. While a read that was given up like that is still under way, no other one is begun in this process.
    """
    check_no_read_is_left_behind()
    for number, source in filling.sources.items():
        begin, end = np.searchsorted(ranges[:, 0], (number, number + 1))
        mine = ranges[begin:end]
        if mine.size:
            spans = np.stack([mine[:, 1], mine[:, 2] - mine[:, 1]], axis=1)
            within(
                timeout,
                "reading a checkpoint",
                functools.partial(source.archive.load, spans, source.plan),
                _native.counters,
                lambda thread: _left_behind.append((thread, filling)),
            )
    return needed_nbytes(ranges)


# Reads that nobody waits for any more. They may still fill the memory of a state, which is kept for them.
_left_behind: list[tuple[threading.Thread, Filling]] = []


def check_no_read_is_left_behind() -> None:
    """Raise `DeadlineError` where a read that was given up may still write into a state, as over what is loaded now."""
    _left_behind[:] = [(thread, filling) for thread, filling in _left_behind if thread.is_alive()]
    if _left_behind:
        what = operation_of(_left_behind[0][0]) or "it"
        raise DeadlineError(
            f"a read of a checkpoint that was given up is still under way ({what}), and may overwrite what is loaded "
            "now: end this process and load in a new one"
        )


def _scatter(copies: Sequence[Copy], memories: Sequence[HostMemory]) -> ScatterPlan:
    """Return where the bytes of one archive go."""
    rows = []
    for copy in copies:
        memory = memories[copy.part]
        address = memory.address + sum(o * s for o, s in zip(copy.target_offset, memory.strides, strict=True))
        target = (address, memory.low, memory.nbytes)
        strides = memory.strides if copy.order is None else tuple(memory.strides[dim] for dim in copy.order)
        boxes = (copy.dense_shape, copy.box_offset, copy.box_shape, strides)
        rows.append(scatter_row(copy.position, copy.nbytes, copy.itemsize, target, *boxes))
    return ScatterPlan.of(rows)
