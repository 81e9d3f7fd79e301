"""Files that are planned as a whole and written through a bounded memory: one is read while the other is written."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptengine._native as _native
from ckptengine.errors import ForeignFormatError, StateError
from ckptengine.export.contents import Item
from ckptengine.load.checkpoint import Opened
from ckptengine.load.slabs import read_boxes, slabs
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.storage.base import ArchiveWriter, Storage
from ckptengine.storage.parallel import in_parallel

__all__ = ["WINDOW_NBYTES", "FilePlan", "Late", "Segment", "write_file"]

WINDOW_NBYTES = 32 << 20
"""Bytes that are read, and written, at once; two such windows and what the reads take is all the memory there is."""
_PAGE = 4096
_Sums = dict[int, int]


@dataclass(frozen=True, slots=True)
class Late:
    """Bytes of a file that are known once what lies before is written: `make` gets the CRC32 of each item so far."""

    nbytes: int
    make: Callable[[_Sums], bytes]


Segment = bytes | Item | Late


@dataclass(frozen=True)
class FilePlan:
    """A file: its name within the target, and what it is made of, in order.

    `sums` tells that the CRC32 of each item is wanted.
    """

    name: str
    segments: tuple[Segment, ...]
    sums: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        nbytes = sum(len(one) if isinstance(one, bytes) else one.nbytes for one in self.segments)
        object.__setattr__(self, "nbytes", nbytes)


class _Window:
    """Page-aligned memory, filled from the front; what is not a whole page at the end of one begins the next."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, WINDOW_NBYTES + 2 * _PAGE)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)
        self.used = 0

    @property
    def room(self) -> int:
        """How many bytes fit."""
        return WINDOW_NBYTES + _PAGE - self.used

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return the next bytes, to be filled."""
        begin, self.used = self.used, self.used + nbytes
        return self.bytes[begin : self.used]


@dataclass(frozen=True, slots=True)
class _Slab:
    """A box of an item that lies in one piece in the file."""

    number: int
    item: Item
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.volume * self.item.itemsize


def write_file(
    plan: FilePlan,
    checkpoint: Opened,
    target: Storage,
    timeout: float,
    progress: Callable[[int], None],
) -> _Sums:
    """Write one file, and return the CRC32 of its items by their place among the segments, where they are wanted.

    Every byte that is read of a checkpoint of ours is verified. `progress` is called with bytes that are written. The
    file appears under its name as a whole, durable, or not at all.
    """
    sums: _Sums = {}
    windows = [_Window(), _Window()]
    steps = _steps(plan)
    with target.create_archive(plan.name, plan.nbytes, write_nbytes=WINDOW_NBYTES) as writer:
        position, number = 0, 0
        full = _fill(windows[0], steps, checkpoint, plan, sums, timeout)
        while True:
            window, other = windows[number % 2], windows[(number + 1) % 2]
            whole = window.used // _PAGE * _PAGE if full else window.used
            rest = window.used - whole
            other.used = 0
            other.take(rest)[:] = window.bytes[whole : window.used]
            write = functools.partial(_write, writer, window, whole, position, not full)
            position += whole
            if not full:
                write()
                progress(whole)
                break
            outcome: list[bool] = []
            read = functools.partial(_fill_into, outcome, other, steps, checkpoint, plan, sums, timeout)
            in_parallel(lambda call: call(), [write, read], 2)
            progress(whole)
            full, number = outcome[0], number + 1
        writer.finish()
    return sums


def _write(writer: ArchiveWriter, window: _Window, nbytes: int, position: int, last: bool) -> None:
    address = window.bytes.ctypes.data
    if last:
        writer.end(address, nbytes, position)
    elif nbytes:
        writer.write(address, nbytes, position)


_Step = bytes | Late | _Slab


class _Steps:
    """What is still to be written of a file, with one step that can be given back."""

    def __init__(self, steps: Iterator[_Step]) -> None:
        self._steps = steps
        self._back: _Step | None = None

    def next(self) -> _Step | None:
        back, self._back = self._back, None
        return back if back is not None else next(self._steps, None)

    def give_back(self, step: _Step) -> None:
        self._back = step


def _steps(plan: FilePlan) -> _Steps:
    def steps() -> Iterator[_Step]:
        for number, segment in enumerate(plan.segments):
            if isinstance(segment, bytes):
                for begin in range(0, len(segment), WINDOW_NBYTES):
                    yield segment[begin : begin + WINDOW_NBYTES]
            elif isinstance(segment, Late):
                yield segment
            else:
                itemsize = max(segment.itemsize, DTYPES[segment.stored].itemsize)
                part = segment.box or Box.whole(segment.shape)
                for box in slabs(part.shape, WINDOW_NBYTES // 2 // itemsize):
                    offset = tuple(a + b for a, b in zip(part.offset, box.offset, strict=True))
                    yield _Slab(number, segment, Box(offset, box.shape))

    return _Steps(steps())


def _fill_into(outcome: list[bool], *arguments: Any) -> None:
    outcome.append(_fill(*arguments))


def _fill(window: _Window, steps: _Steps, checkpoint: Opened, plan: FilePlan, sums: _Sums, timeout: float) -> bool:
    """Fill a window with what comes next; return whether there is more."""
    batch: list[tuple[_Slab, NDArray[np.uint8]]] = []
    converted = 0

    def read() -> None:
        nonlocal converted
        if batch:
            _read(batch, checkpoint, timeout)
            if plan.sums:
                for slab, memory in batch:
                    sums[slab.number] = _native.crc32(memory, sums.get(slab.number, 0))
            batch.clear()
            converted = 0

    while (step := steps.next()) is not None:
        nbytes = len(step) if isinstance(step, bytes) else step.nbytes
        if nbytes > window.room:
            steps.give_back(step)
            read()
            return True
        if isinstance(step, bytes):
            window.take(nbytes)[:] = np.frombuffer(step, np.uint8)
        elif isinstance(step, Late):
            read()  # what it tells of must be known
            data = step.make(sums)
            if len(data) != nbytes:
                raise StateError(f"{plan.name}: {len(data)} bytes where {nbytes} were planned")
            window.take(nbytes)[:] = np.frombuffer(data, np.uint8)
        else:
            scratch = step.box.volume * DTYPES[step.item.stored].itemsize if step.item.stored != step.item.dtype else 0
            if converted + scratch > WINDOW_NBYTES:
                read()
            converted += scratch
            batch.append((step, window.take(nbytes)))
    read()
    return False


def _read(batch: Sequence[tuple[_Slab, NDArray[np.uint8]]], checkpoint: Opened, timeout: float) -> None:
    """Fill memory with slabs, converted where they are written in another dtype."""
    wanted, conversions = [], []
    for slab, memory in batch:
        item = slab.item
        raw = memory
        if item.stored != item.dtype:
            stored = DTYPES[item.stored].numpy
            raw = np.empty(slab.box.volume * stored.itemsize, np.uint8)
            conversions.append((item, raw.view(stored), memory.view(DTYPES[item.dtype].numpy)))
        wanted.append((item.leaf, slab.box, raw))
    read_boxes(checkpoint, wanted, timeout)
    for item, source, target in conversions:
        with np.errstate(over="ignore", invalid="ignore"):
            target[:] = source.astype(target.dtype)
        large = np.isinf(target) & ~np.isinf(source)
        if large.any():
            number = float(source[int(np.argmax(large))])
            raise ForeignFormatError(f"{item.name}: holds {number:.6g}, which {item.dtype} can't; export it as another")
