"""From the files into memory: which bytes to read, and where each goes."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptengine._native as _native
from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.archive.reader import Archive
from ckptengine.errors import CheckpointError, DeadlineError, DeviceError
from ckptengine.layout.read_plan import Copy, WantedPart, blocks, plan_read
from ckptengine.layout.tiling import Int64s
from ckptengine.load.checkpoint import Opened
from ckptengine.load.devices import DeviceCopy, DeviceFilling
from ckptengine.load.schedule import needed_nbytes
from ckptengine.native.tables import NOTHING, Row, ScatterPlan, scatter_row
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, DeviceMemory, HostMemory, Link
from ckptengine.schema.path import Path, dotted
from ckptengine.storage.stuck import operation_of
from ckptengine.storage.within import within

__all__ = ["READ_TIMEOUT", "Filling", "Source", "host_memory", "plan_filling", "read_ranges"]


READ_TIMEOUT = 600.0
"""Seconds without a byte after which a read is given up, where the caller has no other number."""

_ELSEWHERE = HostMemory(0, (), 0, 0, None)
"""In place of what lies on a device."""


@dataclass(frozen=True, slots=True)
class Source:
    """An archive that this rank needs, opened, and where its bytes go."""

    archive: Archive
    plan: ScatterPlan


@dataclass(frozen=True, slots=True)
class Filling:
    """How this rank's parts of leaves are filled: its archives by number, and the ranges that it needs of them.

    `needs` are int64 rows of archive, start and stop, ascending. `finish` is called when all is read: it brings what
    was read for devices there. `memories` keep what is filled where it is. `devices` has the windows of what goes
    straight there; `close` gives them back.
    """

    sources: dict[int, Source]
    needs: Int64s
    finish: Callable[[], None]
    memories: tuple[HostMemory, ...]
    devices: DeviceFilling | None = None

    def close(self) -> None:
        """Give back what the way to devices has taken."""
        if self.devices is not None:
            self.devices.close()


def host_memory(array: NDArray[Any]) -> HostMemory:
    """Return a numpy array's memory; the array must be contiguous."""
    return HostMemory(array.ctypes.data, array.strides, array.ctypes.data, array.nbytes, array)


def plan_filling(checkpoint: Opened, reads: Sequence[tuple[int, ArrayLeaf]], timeout: float = READ_TIMEOUT) -> Filling:
    """Return how to fill this rank's parts of leaves from a checkpoint.

    `reads` are pairs of a leaf's number in the checkpoint's rows and the leaf of the state that it fills. A device may
    take `timeout` seconds for a window. Raises
    `CheckpointDamagedError` naming the leaf that the layout does not cover, or the archive whose tail is damaged.
    """
    wanted: list[WantedPart] = []
    memories: list[HostMemory] = []
    linked: dict[int, tuple[Path, DeviceMemory, Link, np.dtype[Any]]] = {}
    copies_to_devices: list[Callable[[], None]] = []
    for leaf, target in reads:
        dtype = DTYPES[target.dtype].numpy
        for part in target.parts:
            memory = part.memory
            if isinstance(memory, DeviceMemory) and memory.link is not None:
                linked[len(memories)] = target.path, memory, memory.link, dtype
                memory = _ELSEWHERE
            elif isinstance(memory, DeviceMemory):
                staging = _staging(part.box.shape, dtype, target.path)
                copies_to_devices.append(functools.partial(_bring, memory, staging, target.path))
                memory = host_memory(staging)
            wanted.append(WantedPart(leaf, part.box))
            memories.append(memory)
    sources = {}
    needs = [np.zeros((0, 3), np.int64)]
    spans_of: dict[int, Int64s] = {}
    host_rows: dict[int, list[Row]] = {}
    device_copies: dict[int, list[DeviceCopy]] = {}
    for number, copies in sorted(plan_read(checkpoint.rows, wanted).items()):
        archive = checkpoint.archive(number)
        spans = blocks(copies, BLOCK_NBYTES, archive.fixed_nbytes)
        needs.append(np.insert(spans, 0, number, axis=1))
        rows = [_row(copy, memories[copy.part]) for copy in copies if copy.part not in linked]
        if linked:
            spans_of[number], host_rows[number] = spans, rows
            found = [(copy, linked[copy.part]) for copy in copies if copy.part in linked]
            device_copies[number] = [
                DeviceCopy(path, copy, one.owner, link, dtype) for copy, (path, one, link, dtype) in found
            ]
        sources[number] = Source(archive, NOTHING if linked else ScatterPlan.of(rows))
    devices = DeviceFilling(device_copies, host_rows, spans_of, timeout) if linked else None

    def finish() -> None:
        if devices is not None:
            devices.finish()
        for copy in copies_to_devices:
            copy()

    return Filling(sources, np.concatenate(needs), finish, tuple(memories), devices)


def _staging(shape: tuple[int, ...], dtype: np.dtype[Any], path: Path) -> NDArray[Any]:
    """Return host memory for what no link brings to its device."""
    try:
        return np.empty(shape, dtype)
    except MemoryError as error:
        nbytes = math.prod(shape) * dtype.itemsize
        raise CheckpointError(
            f"{dotted(path)}: not enough host memory for {nbytes:,} bytes on their way to a device; load a part "
            "(`only=`), or into a sharded state"
        ) from error


def _bring(memory: DeviceMemory, staging: NDArray[Any], path: Path) -> None:
    """Copy what was read to where no link brings it."""
    try:
        memory.copy_from_host(staging)
    except CheckpointError:
        raise
    except Exception as error:
        what = f"{dotted(path)} ({staging.nbytes:,} bytes) could not be copied to its device"
        raise DeviceError(f"{what}: {type(error).__name__}: {error}; free memory there and try again") from error


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
        if mine.size and filling.devices is not None:
            filling.devices.read(number, mine[:, 1:], functools.partial(_load, filling, source.archive, timeout))
        elif mine.size:
            _load(filling, source.archive, timeout, mine[:, 1:], source.plan)
    return needed_nbytes(ranges)


def _load(filling: Filling, archive: Archive, timeout: float, spans: Int64s, plan: ScatterPlan) -> None:
    """Read ranges (start, stop) of an archive to where a plan says."""

    def left_behind(thread: threading.Thread) -> None:
        if filling.devices is not None:
            filling.devices.left_behind = True
        _left_behind.append((thread, filling))

    ranges = np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)
    call = functools.partial(archive.load, ranges, plan)
    within(timeout, "reading a checkpoint", call, _native.counters, left_behind)


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


def _row(copy: Copy, memory: HostMemory) -> Row:
    """Return where the bytes of a copy go."""
    address = memory.address + sum(o * s for o, s in zip(copy.target_offset, memory.strides, strict=True))
    target = (address, memory.low, memory.nbytes)
    strides = memory.strides if copy.order is None else tuple(memory.strides[dim] for dim in copy.order)
    boxes = (copy.dense_shape, copy.box_offset, copy.box_shape, strides)
    return scatter_row(copy.position, copy.nbytes, copy.itemsize, target, *boxes)
