"""From the files straight to devices: through a few windows of pinned memory, one read while another is copied."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.errors import DeviceError, StorageError
from ckptengine.frameworks.registry import adapters
from ckptengine.layout.read_plan import Copy
from ckptengine.layout.tiling import Int64s, strides_of
from ckptengine.native.tables import Row, ScatterPlan, scatter_row
from ckptengine.schema.leaf import Link, LinkError
from ckptengine.schema.path import Path, dotted
from ckptengine.snapshot.arena import Arena

__all__ = ["WINDOW_NBYTES", "DeviceCopy", "DeviceFilling", "pieces_of"]

WINDOW_NBYTES = 64 << 20
"""Bytes of a window: eight requests to a disk."""
_WINDOWS = 4
"""Two that are read, one that is copied, and one into which the last block of those reaches."""
_READS = 2
"""Windows that are read at a time: while the last requests of one are under way, the next one's keep the disk busy."""
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class DeviceCopy:
    """A copy of `plan_read` that goes to a device: the leaf's path, what owns the part's memory, its link, and the
    numpy dtype."""

    path: Path
    copy: Copy
    owner: Any
    link: Link
    dtype: np.dtype[Any]


@dataclass(slots=True)
class _Window:
    """Pieces that come through one piece of host memory; `left` are the bytes of the file that are still to come."""

    nbytes: int = 0
    pieces: list[_Piece] = field(default_factory=list)
    left: int = 0
    address: int = 0
    memory: object = None
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a `DeviceCopy`, of one window at most: a C-ordered array of `dense` at `position` of the file, of which
    the box at `offset` with the shape `box` begins at `start` of the copy's own box."""

    copy: DeviceCopy
    window: _Window
    at: int
    position: int
    nbytes: int
    dense: tuple[int, ...]
    offset: tuple[int, ...]
    box: tuple[int, ...]
    start: tuple[int, ...]

    def row(self) -> Row:
        """Return the operation that brings it to its window."""
        size = self.copy.dtype.itemsize
        address = self.window.address + self.at
        strides = [stride * size for stride in strides_of(self.box)]
        target = (address, address, math.prod(self.box) * size)
        return scatter_row(self.position, self.nbytes, size, target, self.dense, self.offset, self.box, strides)

    def pair(self) -> tuple[Any, Any]:
        """Return what is to be filled on the device, and from which host memory."""
        one, dtype = self.copy.copy, self.copy.dtype
        count = math.prod(self.box)
        memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(self.window.address + self.at)
        source = np.frombuffer(memory, dtype).reshape(self.box)
        order = tuple(range(len(self.box))) if one.order is None else one.order
        slices: list[Any] = [slice(None)] * len(order)
        for dim, into in enumerate(order):
            begin = one.target_offset[into] + self.start[dim]
            slices[into] = slice(begin, begin + self.box[dim])
        target = self.copy.owner[(*slices, ...)]
        return (target if one.order is None else self.copy.link.turned(target, order)), self.copy.link.host(source)


@dataclass(frozen=True, slots=True)
class _Copying:
    """Pieces of a window that a device is copying, and what waits for them."""

    window: _Window
    pieces: list[_Piece]
    wait: Callable[[float], None]


@contextlib.contextmanager
def _naming(pieces: Sequence[_Piece]) -> Iterator[None]:
    """Have an error of copies to a device name the first piece, or that which could not begin."""
    try:
        yield
    except Exception as error:
        linked = error if isinstance(error, LinkError) else LinkError(f"its device: {type(error).__name__}: {error}", 0)
        piece = pieces[linked.number or 0]
        nbytes = math.prod(piece.box) * piece.copy.dtype.itemsize
        more = f" and {len(pieces) - 1:,} more pieces" if linked.number is None and len(pieces) > 1 else ""
        what = f"{dotted(piece.copy.path)} ({nbytes:,} bytes of it){more} could not be copied to {linked}"
        raise DeviceError(what, linked.under_way) from (error.__cause__ or error)


class _Archive:
    """What of an archive goes where: the rows for host memory, and the pieces for devices, by their positions."""

    def __init__(self, rows: Sequence[Row], pieces: Sequence[_Piece], needs: Int64s) -> None:
        entries: list[tuple[int, int, Row | _Piece]] = [(row[0], row[0] + row[1], row) for row in rows]
        entries += [(piece.position, piece.position + piece.nbytes, piece) for piece in pieces]
        entries.sort(key=lambda entry: entry[:2])
        self._entries = entries
        self._starts = [begin for begin, _, _ in entries]
        self._reach = list(itertools.accumulate((end for _, end, _ in entries), max))
        self._begins: list[int] = needs[:, 0].tolist()
        self._sums = [0, *np.cumsum(needs[:, 1] - needs[:, 0]).tolist()]
        self._ends: list[int] = needs[:, 1].tolist()
        firsts: dict[int, int] = {}
        for piece in pieces:
            firsts.setdefault(id(piece.window), piece.position)
            piece.window.left += self.needed(piece.position, piece.position + piece.nbytes)
        self._cuts = [-(-start // BLOCK_NBYTES) * BLOCK_NBYTES for start in list(firsts.values())[1:]]

    def needed(self, begin: int, end: int) -> int:
        """Return how many bytes between two positions are needed at all, by anything."""
        return max(0, self._below(end) - self._below(begin))

    def _below(self, position: int) -> int:
        number = bisect.bisect_right(self._begins, position)
        if not number:
            return 0
        return int(self._sums[number - 1]) + min(position, self._ends[number - 1]) - self._begins[number - 1]

    def meeting(self, begin: int, end: int) -> list[Row | _Piece]:
        """Return what has bytes between two positions, by its own."""
        first, last = bisect.bisect_right(self._reach, begin), bisect.bisect_left(self._starts, end)
        return [one for _, stop, one in self._entries[first:last] if stop > begin]

    def window_of(self, position: int) -> int:
        """Return the number of the window to which what lies at a position belongs, counted within this archive."""
        return bisect.bisect_right(self._cuts, position)

    def cut(self, spans: Int64s) -> Iterator[Int64s]:
        """Yield ranges (rows of start and stop), cut where windows begin, those of one window at a time."""
        rows: list[tuple[int, int]] = []
        for begin, end in spans.tolist():
            for cut in self._cuts[self.window_of(begin) : bisect.bisect_left(self._cuts, end)]:
                if cut > begin:
                    rows.append((begin, cut))
                    begin = cut
            rows.append((begin, end))
        for _, some in itertools.groupby(rows, lambda row: self.window_of(row[0])):
            yield np.array(list(some), np.int64)


_left: list[object] = []
"""Windows that devices which did not answer may still read, for as long as the process lives."""


class DeviceFilling:
    """Fills parts on devices: gives the plans of what is read, and copies each window when all of it has come.

    Used by one thread. `close` must be called; what has been begun is then waited for.
    """

    def __init__(
        self,
        copies: Mapping[int, Sequence[DeviceCopy]],
        rows: Mapping[int, Sequence[Row]],
        needs: Mapping[int, Int64s],
        timeout: float,
    ) -> None:
        """`copies` to devices, `rows` of what goes to host memory, and `needs` (start, stop), of each archive.

        A device may take `timeout` seconds for a window.
        """
        self._timeout = timeout
        self._archives: dict[int, _Archive] = {}
        self._windows: list[_Window] = []
        self._links = list({id(one.link): one.link for some in copies.values() for one in some}.values())
        for number, spans in needs.items():
            pieces = sorted(
                (piece for one in copies.get(number, ()) for piece in pieces_of(one, WINDOW_NBYTES)),
                key=lambda piece: piece[1],
            )
            self._archives[number] = _Archive(rows.get(number, ()), self._pack(pieces), spans)
        self._moments: dict[int, object] = {}
        self._arena = Arena()
        self._free: list[int] = []
        self._copying: deque[_Copying] = deque()
        self._opened = False
        self.left_behind = False
        """A read that was given up may still write to the windows: they are not given back."""
        self._under_way = False  # a device may still read them

    def _pack(self, pieces: Sequence[tuple[Any, ...]]) -> list[_Piece]:
        """Spread pieces, given by position, over windows."""
        placed: list[_Piece] = []
        window = _Window(WINDOW_NBYTES)  # as full: the first piece begins one
        for copy, position, nbytes, dense, offset, box, start in pieces:
            size = -(-math.prod(box) * copy.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            if window.nbytes + size > WINDOW_NBYTES:
                window = _Window()
                self._windows.append(window)
            piece = _Piece(copy, window, window.nbytes, position, nbytes, dense, offset, box, start)
            window.nbytes += size
            window.pieces.append(piece)
            placed.append(piece)
        return placed

    def read(self, number: int, spans: Int64s, load: Callable[[Int64s, ScatterPlan], None]) -> None:
        """Have ranges of an archive (rows of start and stop) read by `load`, given those of one window at a time.

        Each is called in a thread of its own, two at a time. Raises what `load` raises, and `DeviceError`.
        """
        archive = self._archives[number]
        under_way: deque[tuple[Int64s, Future[None]]] = deque()
        with ThreadPoolExecutor(_READS, "ckptengine-window") as threads:
            try:
                for some in archive.cut(spans):
                    if len(under_way) == _READS:
                        self._end(archive, under_way)
                    plan = self._plan(archive, int(some[0, 0]), int(some[-1, 1]), lambda: self._end(archive, under_way))
                    under_way.append((some, threads.submit(load, some, plan)))
                while under_way:
                    self._end(archive, under_way)
            except BaseException:
                for _, future in under_way:
                    with contextlib.suppress(Exception):
                        future.result()
                raise

    def _end(self, archive: _Archive, under_way: deque[tuple[Int64s, Future[None]]]) -> bool:
        """Wait for the read that was begun first; return whether there was one."""
        if not under_way:
            return False
        some, future = under_way.popleft()
        future.result()
        for begin, end in some.tolist():
            self._came(archive, begin, end)
        return True

    def groups(self, number: int, positions: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield begin and end of runs of requests, given by position, that belong to one window each."""
        archive, begin = self._archives[number], 0
        for _, some in itertools.groupby(positions, archive.window_of):
            end = begin + len(list(some))
            yield begin, end
            begin = end

    def plan(self, number: int, begin: int, end: int) -> ScatterPlan:
        """Return where the bytes between two positions of an archive go; `came` must follow."""
        return self._plan(self._archives[number], begin, end, lambda: False)

    def came(self, number: int, begin: int, end: int) -> None:
        """Note that the bytes between two positions of an archive are there; none is told twice."""
        self._came(self._archives[number], begin, end)

    def finish(self) -> None:
        """Return when all is on the devices; raises `DeviceError`."""
        assert not any(window.left for window in self._windows)
        while self._copying:
            self._end_copy()

    def close(self) -> None:
        """Wait for what was begun, whatever came of it, and give the memory back."""
        try:
            while self._copying and not self._under_way:
                with contextlib.suppress(DeviceError):
                    self._end_copy()
        finally:
            if self._under_way or self._copying:  # some are left where Ctrl-C came once more
                self._arena.leave()
                _left.append(self._windows)
            elif not self.left_behind:
                self._arena.close()

    def _plan(self, archive: _Archive, begin: int, end: int, end_read: Callable[[], bool]) -> ScatterPlan:
        rows: list[Row] = []
        for one in archive.meeting(begin, end):
            if not isinstance(one, _Piece):
                rows.append(one)
            elif archive.needed(max(begin, one.position), min(end, one.position + one.nbytes)):
                if not one.window.address:
                    self._bind(one.window, end_read)
                rows.append(one.row())
        return ScatterPlan.of(rows)

    def _bind(self, window: _Window, end_read: Callable[[], bool]) -> None:
        """Give a window memory: a slot that is free or becomes so, else, where all wait for bytes, some of its own."""
        self._open()
        while not self._free and (self._copying or end_read()):
            if self._copying and not self._free:
                self._end_copy()
        if self._free:
            window.slot = self._free.pop()
            window.address = self._arena.address + window.slot * WINDOW_NBYTES
        else:
            memory = np.empty(window.nbytes, np.uint8)
            window.address, window.memory = memory.ctypes.data, memory

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        for link in self._links:
            with _naming(self._windows[0].pieces):
                self._moments[id(link)] = link.mark()
        count = min(_WINDOWS, len(self._windows))
        size = WINDOW_NBYTES if count > 1 else sum(window.nbytes for window in self._windows)
        with contextlib.suppress(StorageError):  # memory is short: each window gets its own
            self._arena.reserve(count * size)
            for adapter in adapters():
                self._arena.pin(adapter.pin_host_memory)
            self._free = list(range(count))

    def _came(self, archive: _Archive, begin: int, end: int) -> None:
        for one in archive.meeting(begin, end):
            if not isinstance(one, _Piece):
                continue
            come = archive.needed(max(begin, one.position), min(end, one.position + one.nbytes))
            one.window.left -= come
            if come and not one.window.left:
                self._copy(one.window)

    def _copy(self, window: _Window) -> None:
        """Begin to copy a window that has come to the devices."""
        for link in self._links:
            pieces = [piece for piece in window.pieces if piece.copy.link is link]
            if pieces:
                try:
                    with _naming(pieces):
                        wait = link.to_device([piece.pair() for piece in pieces], self._moments[id(link)])
                except DeviceError as error:
                    self._under_way = self._under_way or error.under_way
                    raise
                self._copying.append(_Copying(window, pieces, wait))

    def _end_copy(self) -> None:
        first = self._copying[0]
        try:
            with _naming(first.pieces):
                first.wait(self._timeout)
        except DeviceError as error:
            self._under_way = error.under_way
            self._copying.popleft()
            raise
        self._copying.popleft()
        window = first.window
        if any(other.window is window for other in self._copying):
            return
        if window.slot is not None:
            self._free.append(window.slot)
        window.slot, window.memory = None, None


def pieces_of(one: DeviceCopy, most: int) -> Iterator[tuple[Any, ...]]:
    """Yield the pieces of a copy, none of more than `most` bytes, each of consecutive bytes of the file.

    Of each: the copy, position and bytes, the dense shape there, offset and shape of the box in it, and where that
    begins in the copy's own box.
    """
    copy = one.copy
    start = (0,) * len(copy.box_shape)
    for rest in _cut(copy.position, copy.dense_shape, copy.box_offset, copy.box_shape, start, copy.itemsize, most, 0):
        yield one, *rest


def _cut(
    position: int,
    dense: tuple[int, ...],
    offset: tuple[int, ...],
    box: tuple[int, ...],
    start: tuple[int, ...],
    itemsize: int,
    most: int,
    dim: int,
) -> Iterator[tuple[Any, ...]]:
    """Cut a box along dimension `dim` and those after it; the box is of length 1 along those before."""
    if dim == len(dense):
        yield position, math.prod(dense) * itemsize, dense, offset, box, start
        return
    inner, row = math.prod(dense[dim + 1 :]) * itemsize, math.prod(box[dim + 1 :]) * itemsize
    rows = max(1, most // row)
    for first in range(0, box[dim], rows):
        count = min(rows, box[dim] - first)
        at = position + (offset[dim] + first) * inner
        there, within = _with(dense, dim, count), _with(offset, dim, 0)
        some, begin = _with(box, dim, count), _with(start, dim, start[dim] + first)
        if count == 1:
            yield from _cut(at, there, within, some, begin, itemsize, most, dim + 1)
        else:
            yield at, math.prod(there) * itemsize, there, within, some, begin


def _with(numbers: tuple[int, ...], dim: int, number: int) -> tuple[int, ...]:
    return (*numbers[:dim], number, *numbers[dim + 1 :])
