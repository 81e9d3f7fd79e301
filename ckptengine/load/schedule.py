"""Who of a node reads what: the same table on all its ranks, from what each of them needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptengine.layout.tiling import Int64s

__all__ = ["REQUEST_NBYTES", "Request", "Schedule", "make_schedule", "needed_nbytes"]

REQUEST_NBYTES = 4 << 20
"""Bytes of one shared request at most: large enough for the device, small enough that a window holds many."""


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes of one archive that several ranks want, read by one of them; ranks count within the node."""

    number: int
    archive: int
    position: int
    nbytes: int
    reader: int
    consumers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the ranks of a node read: `requests` hand over what several want, by archive and position.

    `private[rank]` (int64 rows of archive, start and stop, ascending) is what that rank alone wants, and
    `node_nbytes` the bytes that any of them wants, each counted once.
    """

    requests: tuple[Request, ...]
    private: tuple[Int64s, ...]
    node_nbytes: int


def needed_nbytes(needs: Int64s) -> int:
    """Return the bytes of some ranges."""
    return int((needs[:, 2] - needs[:, 1]).sum())


def make_schedule(needs: Sequence[Int64s], request_nbytes: int = REQUEST_NBYTES) -> Schedule:
    """Return who reads what, given the ranges of whole blocks that each rank of a node needs.

    `needs[rank]` are int64 rows of archive, start and stop (bytes), ascending, of which no two touch. Every byte that a
    rank needs is in one request or in one private range, and no other byte is. A piece of at most `request_nbytes`
    that two ranks want a part of is read once; who wants but one rank's bytes reads them alone. Reading is spread by
    bytes over those that want the piece, since only they have opened the archive.
    """
    line = _Line(needs)
    ranges = [line.to(rows) for rows in needs]
    pieces = _cut(_union(ranges), request_nbytes)
    wants = np.stack([_meets(pieces, mine) for mine in ranges])
    shared = wants.sum(axis=0) > 1
    load = [0] * len(needs)
    requests = []
    for number, (piece, archive, start) in enumerate(line.back(pieces[shared])):
        consumers = tuple(np.flatnonzero(wants[:, shared][:, number]).tolist())
        reader = min(consumers, key=load.__getitem__)
        load[reader] += piece
        requests.append(Request(number, archive, start, piece, reader, consumers))
    private = tuple(
        np.array(
            [
                (archive, start, start + nbytes)
                for nbytes, archive, start in line.back(_union([pieces[mine & ~shared]]))
            ],
            np.int64,
        ).reshape(-1, 3)
        for mine in wants
    )
    return Schedule(tuple(requests), private, int((pieces[:, 1] - pieces[:, 0]).sum()))


class _Line:
    """All archives one after the other on one line, with gaps, so that ranges of two never touch."""

    def __init__(self, needs: Sequence[Int64s]) -> None:
        rows = np.concatenate(needs)
        self._archives, place = np.unique(rows[:, 0], return_inverse=True)
        ends = np.zeros(self._archives.size, np.int64)
        np.maximum.at(ends, place, rows[:, 2])
        self._bases = np.cumsum(ends + 1) - (ends + 1)

    def to(self, rows: Int64s) -> Int64s:
        """Return ranges on the line, int64 [n, 2], of rows of archive, start and stop."""
        return rows[:, 1:] + self._bases[np.searchsorted(self._archives, rows[:, 0])][:, None]

    def back(self, ranges: Int64s) -> Iterator[tuple[int, int, int]]:
        """Yield length, archive and start within it of ranges on the line."""
        place = np.searchsorted(self._bases, ranges[:, 0], "right") - 1
        return zip(
            (ranges[:, 1] - ranges[:, 0]).tolist(),
            self._archives[place].tolist(),
            (ranges[:, 0] - self._bases[place]).tolist(),
            strict=True,
        )


def _union(ranges: Sequence[Int64s]) -> Int64s:
    """Return the union of some sets of ranges: ascending, none touching the next."""
    rows = np.concatenate(ranges)
    if not rows.size:
        return rows
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    reach = np.maximum.accumulate(rows[:, 1])
    new = np.flatnonzero(np.append(True, rows[1:, 0] > reach[:-1]))
    return np.stack([rows[new, 0], np.append(reach[new[1:] - 1], reach[-1])], axis=1)


def _cut(ranges: Int64s, nbytes: int) -> Int64s:
    """Return the pieces of at most `nbytes` of some ranges."""
    counts = -(-(ranges[:, 1] - ranges[:, 0]) // nbytes)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(ranges[:, 0], counts) + (np.arange(counts.sum()) - first) * nbytes
    return np.stack([starts, np.minimum(starts + nbytes, np.repeat(ranges[:, 1], counts))], axis=1)


def _meets(pieces: Int64s, ranges: Int64s) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which pieces share a byte with some range; both ascend, and neither overlaps itself."""
    begun = np.searchsorted(ranges[:, 0], pieces[:, 1])
    ended = np.searchsorted(ranges[:, 1], pieces[:, 0], "right")
    return begun > ended
