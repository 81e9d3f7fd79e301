"""Which stored bytes a reader needs: copies out of chunks for wanted boxes, and blocks of the archives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptengine.errors import CheckpointDamagedError, LoadMismatchError
from ckptengine.layout.grid import cell_counts
from ckptengine.layout.rows import LeafRecord, Rows
from ckptengine.layout.tiling import Int64s, find_fault, strides_of, untiled
from ckptengine.schema.box import Box
from ckptengine.schema.ranks import name_ranks

__all__ = ["Copy", "WantedPart", "blocks", "plan_read"]


@dataclass(frozen=True, slots=True)
class WantedPart:
    """One box that a reader wants of `rows.leaves[leaf]`."""

    leaf: int
    box: Box


@dataclass(frozen=True, slots=True)
class Copy:
    """One box to copy from one stored chunk to one wanted part; all shapes and offsets in elements.

    The chunk lies at `position` of archive `archive` and has `nbytes` bytes: a C-ordered tensor of
    `dense_shape` with elements of `itemsize` bytes. The box at `box_offset` of it, with `box_shape`, goes to
    `target_offset` of the part `wanted[part]`. With `order` the chunk's dimensions are the part's in that order.
    """

    part: int
    archive: int
    position: int
    nbytes: int
    itemsize: int
    dense_shape: tuple[int, ...]
    box_offset: tuple[int, ...]
    box_shape: tuple[int, ...]
    target_offset: tuple[int, ...]
    order: tuple[int, ...] | None = None


class _Intervals:
    """The boxes of one leaf, sorted along each dimension, to find those that meet a box."""

    def __init__(self, offsets: Int64s, lengths: Int64s) -> None:
        self.offsets, self.ends = offsets, offsets + lengths
        self._orders = [np.argsort(offsets[:, dim], kind="stable") for dim in range(offsets.shape[1])]
        self._starts = [offsets[order, dim] for dim, order in enumerate(self._orders)]
        # The furthest end so far never falls, so it can be searched whatever the boxes' lengths.
        self._reach = [np.maximum.accumulate(self.ends[order, dim]) for dim, order in enumerate(self._orders)]

    def meeting(self, box: Box) -> Int64s:
        """Return the rows, ascending, that share an element with the box."""
        rows: Int64s = np.arange(self.offsets.shape[0])
        for order, starts, reach, first, length in zip(
            self._orders, self._starts, self._reach, box.offset, box.shape, strict=True
        ):
            begin, end = (
                int(np.searchsorted(reach, first, "right")),
                int(np.searchsorted(starts, first + length)),
            )
            if end - begin < rows.size:  # the most selective dimension gives the candidates
                rows = order[begin : max(begin, end)]
        low, high = np.asarray(box.offset, np.int64), np.asarray(box.offset, np.int64) + np.asarray(box.shape)
        hit = ((self.offsets[rows] < high) & (self.ends[rows] > low)).all(axis=1)
        return np.sort(rows[hit])


def plan_read(rows: Rows, wanted: Sequence[WantedPart]) -> dict[int, list[Copy]]:
    """Return for each archive that is needed its copies, by position; together they fill every wanted part.

    The cells of a grid that a part meets are known by arithmetic, fragments are found by interval search: the
    work and the rows that are looked at grow with what is wanted. Raises CheckpointDamagedError, naming the
    leaf, where the stored boxes don't cover each element of a part exactly once, and LoadMismatchError where a
    part is not within its leaf.
    """
    intervals: dict[int, _Intervals] = {}
    pieces: list[_Pieces] = []
    for part, one in enumerate(wanted):
        record = rows.leaves[one.leaf]
        _check_within(record, one.box)
        if record.chunk_shape is not None:
            pieces.append(_cut_grid(part, record, record.chunk_shape, one.box))
            continue
        if one.leaf not in intervals:
            intervals[one.leaf] = _Intervals(*rows.boxes(one.leaf))
        pieces.append(_cut(part, record, one.box, intervals[one.leaf]))
    needed = np.asarray([row for one in pieces for row in one.rows], np.int64)
    archive, position = rows.places(
        needed,
        np.asarray([nbytes for one in pieces for nbytes in one.nbytes], np.int64),
    )
    _check_covered(pieces, archive)
    result: dict[int, list[Copy]] = {}
    for copy in _copies(pieces, archive.tolist(), position.tolist(), rows.orders(needed)):
        result.setdefault(copy.archive, []).append(copy)
    for copies in result.values():
        copies.sort(key=lambda copy: (copy.position, copy.part))
    return dict(sorted(result.items()))


def blocks(copies: Iterable[Copy], block_nbytes: int, fixed_nbytes: int) -> Int64s:
    """Return the byte ranges of one archive that these copies of it need, int64 [m, 2]: start and end.

    They are the union of the checksum blocks (of `block_nbytes`, the last one ends at `fixed_nbytes`) that
    hold a byte of some copy's box, no others; ranges are ascending and never touch. Raises
    CheckpointDamagedError where a chunk does not lie within the fixed region.
    """
    first: list[Int64s] = []
    last: list[Int64s] = []
    for copy in copies:
        if copy.position < 0 or copy.nbytes < 0 or copy.nbytes > fixed_nbytes - copy.position:
            raise CheckpointDamagedError(
                f"archive of rank {copy.archive}: a chunk of {copy.nbytes} bytes at {copy.position} does not "
                f"lie within the {fixed_nbytes} bytes that are there; restore an older checkpoint"
            )
        starts, length = _runs(copy, block_nbytes)
        first.append(starts // block_nbytes)
        last.append((starts + length - 1) // block_nbytes)
    if not first:
        return np.zeros((0, 2), np.int64)
    begins, ends = np.concatenate(first), np.concatenate(last) + 1
    order = np.argsort(begins, kind="stable")
    begins, reach = begins[order], np.maximum.accumulate(ends[order])
    new = np.flatnonzero(np.append(True, begins[1:] > reach[:-1]))
    ranges: Int64s = np.stack([begins[new], np.append(reach[new[1:] - 1], reach[-1])], axis=1) * block_nbytes
    ranges[-1, 1] = min(int(ranges[-1, 1]), fixed_nbytes)
    return ranges


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What stored chunks have of one wanted part, one item of each list per chunk."""

    part: int
    leaf: LeafRecord
    box: Box
    stored: bool  # whether the boxes were read from a file, so that they may overlap or leave holes
    rows: list[int]
    nbytes: list[int]
    dense: list[tuple[int, ...]]
    inner: list[tuple[int, ...]]  # within the chunk
    sizes: list[tuple[int, ...]]
    targets: list[tuple[int, ...]]  # within the part


def _check_within(record: LeafRecord, box: Box) -> None:
    ndim = len(record.shape)
    if len(box.offset) != ndim or len(box.shape) != ndim:
        raise LoadMismatchError(
            f"{record.name}: a part of {len(box.shape)} dimensions is wanted, the checkpoint has shape "
            f"{record.shape}; load into a state of the same shapes"
        )
    if box.volume and not all(
        offset >= 0 and size >= 1 and offset + size <= length
        for offset, size, length in zip(box.offset, box.shape, record.shape, strict=True)
    ):
        raise LoadMismatchError(
            f"{record.name}: the part at {box.offset} with shape {box.shape} is not within the checkpoint's "
            f"shape {record.shape}; load into a state of the same shapes"
        )


def _cut_grid(part: int, record: LeafRecord, chunk: tuple[int, ...], box: Box) -> _Pieces:
    """Return the cells of a grid that a part meets; they cover it exactly once because a grid does."""
    numbers, cuts = [0], []
    for offset, length, step, count in zip(box.offset, box.shape, chunk, cell_counts(record.shape, chunk), strict=True):
        cells = range(offset // step, -(-(offset + length) // step))
        numbers = [number * count + cell for number in numbers for cell in cells]
        cut = []
        for cell in cells:
            low, high = max(offset, cell * step), min(offset + length, cell * step + step)
            cut.append((low - cell * step, high - low, low - offset))
        cuts.append(cut)
    rows = [record.rows[0] + number for number in numbers] if box.volume else []
    found = list(itertools.product(*cuts)) if box.volume else []
    inner, sizes, targets = ([tuple(dim[kind] for dim in piece) for piece in found] for kind in range(3))
    count, nbytes = len(rows), math.prod(chunk) * record.itemsize
    return _Pieces(part, record, box, False, rows, [nbytes] * count, [chunk] * count, inner, sizes, targets)


def _cut(part: int, record: LeafRecord, box: Box, intervals: _Intervals) -> _Pieces:
    """Return the fragments that a part meets."""
    found = intervals.meeting(box) if box.volume else np.zeros(0, np.int64)
    low = np.asarray(box.offset, np.int64)
    offsets, ends = intervals.offsets[found], intervals.ends[found]
    starts = np.maximum(offsets, low)
    sizes = np.minimum(ends, low + np.asarray(box.shape, np.int64)) - starts
    lengths = ends - offsets
    rows = (found + record.rows[0]).tolist()
    nbytes = (lengths.prod(axis=1) * record.itemsize).tolist()
    dense, inner, reach, targets = (
        list(map(tuple, numbers.tolist())) for numbers in (lengths, starts - offsets, sizes, starts - low)
    )
    return _Pieces(part, record, box, True, rows, nbytes, dense, inner, reach, targets)


def _check_covered(pieces: Sequence[_Pieces], archive: Int64s) -> None:
    """Raise where stored pieces of a part don't cover each of its elements exactly once; all parts in one go.

    `archive` has the archive of each piece's rows, one piece after the other.
    """
    stored = [one for one in pieces if one.stored]
    wrong = untiled(
        [one.box.shape for one in stored],
        np.asarray([len(one.rows) for one in stored], np.int64),
        np.asarray([number for one in stored for piece in one.targets for number in piece], np.int64),
        np.asarray([number for one in stored for piece in one.sizes for number in piece], np.int64),
    )
    if not wrong.size:
        return
    one = stored[int(wrong[0])]
    shape = (len(one.rows), len(one.box.shape))
    fault = find_fault(one.box.shape, *(np.asarray(n, np.int64).reshape(shape) for n in (one.targets, one.sizes)))
    element = [o + e for o, e in zip(one.box.offset, fault.element, strict=True)]
    found = "no stored box"
    if fault.rows:
        start = sum(len(before.rows) for before in itertools.takewhile(lambda other: other is not one, pieces))
        ranks = archive[start + np.asarray(fault.rows)].tolist()
        found = f"{len(fault.rows)} stored boxes in the archives of {name_ranks(ranks)}"
    raise CheckpointDamagedError(
        f"{one.leaf.name}: element {element} of shape {one.leaf.shape} lies in {found} instead of one; the "
        "layout file is damaged: restore an older checkpoint"
    )


def _copies(
    pieces: Sequence[_Pieces],
    archive: Sequence[int],
    position: Sequence[int],
    orders: Sequence[tuple[int, ...] | None] | None,
) -> Iterator[Copy]:
    """Yield the copy of each piece; `archive`, `position` and `orders` go on over all pieces."""
    places = zip(archive, position, orders or itertools.repeat(None, len(archive)), strict=True)
    for one in pieces:
        lists = zip(one.nbytes, one.dense, one.inner, one.sizes, one.targets, strict=True)
        for nbytes, dense, inner, size, target in lists:
            number, place, order = next(places)
            if order is not None:
                dense, inner, size = (tuple(one[dim] for dim in order) for one in (dense, inner, size))
            yield Copy(one.part, number, place, nbytes, one.leaf.itemsize, dense, inner, size, target, order)


def _runs(copy: Copy, block_nbytes: int) -> tuple[Int64s, int]:
    """Return the starts (bytes of the archive) and the length of runs that touch exactly the needed blocks.

    From the innermost dimension outward, neighbours become one run where the gap between them holds no whole
    block: then every block from the first byte to the last is needed. What stays apart is a block apart at
    least, so there are never more runs than the chunk has blocks, and one.
    """
    strides = [stride * copy.itemsize for stride in strides_of(copy.dense_shape)]
    begin = copy.position + sum(o * s for o, s in zip(copy.box_offset, strides, strict=True))
    length = copy.itemsize
    starts = np.zeros(1, np.int64)
    for size, stride in zip(reversed(copy.box_shape), reversed(strides), strict=True):
        if starts.size == 1 and (size == 1 or stride - length < block_nbytes):
            length += (size - 1) * stride
        else:
            starts = (np.arange(size, dtype=np.int64)[:, None] * stride + starts).reshape(-1)
    return starts + begin, length
