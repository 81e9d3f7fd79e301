"""Which stored bytes a reader needs: copies out of chunks for wanted boxes, and blocks of the archives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptengine.comm.ranks import name_ranks
from ckptengine.errors import CheckpointDamagedError, LoadMismatchError
from ckptengine.layout.box import Box
from ckptengine.layout.rows import LeafRecord, RowTable
from ckptengine.layout.tiling import Int64s, find_fault, inside, strides_of, untiled

__all__ = ["Copy", "WantedPart", "blocks", "plan_read"]


@dataclass(frozen=True, slots=True)
class WantedPart:
    """One box that a reader wants of `table.leaves[leaf]`."""

    leaf: int
    box: Box


@dataclass(frozen=True, slots=True)
class Copy:
    """One box to copy from one stored chunk to one wanted part; all shapes and offsets in elements.

    The chunk lies at `position` of archive `archive` and has `nbytes` bytes: a C-ordered tensor of
    `dense_shape` with elements of `itemsize` bytes. The box at `box_offset` of it, with `box_shape`, goes to
    `target_offset` of the part `wanted[part]`.
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


def plan_read(table: RowTable, wanted: Sequence[WantedPart]) -> dict[int, list[Copy]]:
    """Return for each archive that is needed its copies, by position; together they fill every wanted part.

    Finds the stored boxes by interval search in the rows of the wanted leaves only. Raises
    CheckpointDamagedError, naming the leaf, where the stored boxes don't cover each element of a part exactly
    once, and LoadMismatchError where a part is not within its leaf.
    """
    by_leaf: dict[int, list[int]] = {}
    for part, one in enumerate(wanted):
        by_leaf.setdefault(one.leaf, []).append(part)
    pieces: list[_Pieces] = []
    for leaf, parts in by_leaf.items():
        intervals = _Intervals(*table.boxes(leaf))
        for part in parts:
            _check_within(table.leaves[leaf], wanted[part].box)
            pieces.append(_cut(part, leaf, wanted[part].box, intervals))
    _check_covered(table, pieces)
    result: dict[int, list[Copy]] = {}
    for one_part in pieces:
        for copy in _copies(table, one_part):
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
    """What the stored boxes have of one wanted part: int64 [n, ndim], and their rows in the leaf."""

    part: int
    leaf: int
    box: Box
    rows: Int64s
    stored_offsets: Int64s
    stored_lengths: Int64s
    targets: Int64s  # within the part
    sizes: Int64s


def _check_within(record: LeafRecord, box: Box) -> None:
    ndim = len(record.shape)
    if len(box.offset) != ndim or len(box.shape) != ndim:
        raise LoadMismatchError(
            f"{record.name}: a part of {len(box.shape)} dimensions is wanted, the checkpoint has shape "
            f"{record.shape}; load into a state of the same shapes"
        )
    low, shape = np.asarray([box.offset], np.int64), np.asarray([box.shape], np.int64)
    if box.volume and not inside(record.shape, low, shape).all():
        raise LoadMismatchError(
            f"{record.name}: the part at {box.offset} with shape {box.shape} is not within the checkpoint's "
            f"shape {record.shape}; load into a state of the same shapes"
        )


def _cut(part: int, leaf: int, box: Box, intervals: _Intervals) -> _Pieces:
    rows = intervals.meeting(box) if box.volume else np.zeros(0, np.int64)
    low = np.asarray(box.offset, np.int64)
    offsets, ends = intervals.offsets[rows], intervals.ends[rows]
    starts = np.maximum(offsets, low)
    sizes = np.minimum(ends, low + np.asarray(box.shape, np.int64)) - starts
    return _Pieces(part, leaf, box, rows, offsets, ends - offsets, starts - low, sizes)


def _check_covered(table: RowTable, pieces: Sequence[_Pieces]) -> None:
    """Raise where the pieces of a part don't cover each of its elements exactly once; all parts in one go."""
    empty = np.zeros(0, np.int64)
    wrong = untiled(
        [one.box.shape for one in pieces],
        np.asarray([one.rows.size for one in pieces], np.int64),
        np.concatenate([empty, *(one.targets.reshape(-1) for one in pieces)]),
        np.concatenate([empty, *(one.sizes.reshape(-1) for one in pieces)]),
    )
    if not wrong.size:
        return
    one = pieces[int(wrong[0])]
    record = table.leaves[one.leaf]
    fault = find_fault(one.box.shape, one.targets, one.sizes)
    assert fault is not None
    element = [o + e for o, e in zip(one.box.offset, fault.element, strict=True)]
    found = "no stored box"
    if fault.rows:
        ranks = table.archive[one.rows[list(fault.rows)] + record.rows[0]].tolist()
        found = f"{len(fault.rows)} stored boxes in the archives of {name_ranks(ranks)}"
    raise CheckpointDamagedError(
        f"{record.name}: element {element} of shape {record.shape} lies in {found} instead of one; the "
        "layout file is damaged: restore an older checkpoint"
    )


def _copies(table: RowTable, pieces: _Pieces) -> Iterator[Copy]:
    record = table.leaves[pieces.leaf]
    stored = pieces.rows + record.rows[0]
    chunk = record.chunk_shape
    for archive, position, nbytes, length, inner, size, target in zip(
        table.archive[stored].tolist(),
        table.position[stored].tolist(),
        table.nbytes[stored].tolist(),
        pieces.stored_lengths.tolist(),
        (pieces.targets + np.asarray(pieces.box.offset, np.int64) - pieces.stored_offsets).tolist(),
        pieces.sizes.tolist(),
        pieces.targets.tolist(),
        strict=True,
    ):
        dense = tuple(length) if chunk is None else chunk
        yield Copy(
            pieces.part,
            archive,
            position,
            nbytes,
            record.itemsize,
            dense,
            tuple(inner),
            tuple(size),
            tuple(target),
        )


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
