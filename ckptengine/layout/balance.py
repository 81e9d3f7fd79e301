"""Which of its holders writes a piece that several ranks hold: the least loaded, the largest pieces first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ckptengine.layout.tiling import Int64s

__all__ = ["Run", "balance", "runs_of"]


@dataclass(frozen=True, slots=True)
class Run:
    """Pieces of one leaf that have the same size and are assigned one step after the other.

    A step is the numbers of its pieces (int64 [k]) and their holders (int64 [k, holders], ascending); no rank holds
    two pieces of one step, so that their order does not matter.
    """

    nbytes: int
    steps: tuple[tuple[Int64s, Int64s], ...] = field(compare=False, repr=False)


def runs_of(nbytes: Int64s, writers: Int64s, ranks: Int64s, bounds: Int64s) -> tuple[Run, ...]:
    """Return the runs of a leaf's pieces whose writer is open (-1), the largest first.

    `nbytes` and `writers` have one number for each piece, sorted by place; the holders of piece i are
    `ranks[bounds[i, 0] : bounds[i, 1]]`. Pieces of one size that are cut out of one box have the same holders.
    """
    result = []
    open_pieces = np.flatnonzero(writers < 0)
    for size in np.unique(nbytes[open_pieces])[::-1].tolist():
        pieces = open_pieces[nbytes[open_pieces] == size]
        result.append(Run(int(size), tuple(_steps(pieces, ranks, bounds))))
    return tuple(result)


def balance(leaves: Sequence[tuple[Sequence[Run], Int64s]], load: Int64s) -> None:
    """Choose the open writers of leaves, given the runs of each and its writers (changed in place).

    `load` (int64, one per rank) is what each rank writes anyway; it is changed in place. This is Graham's rule
    (1969, "Bounds on multiprocessing timing anomalies": at most 4/3 of the best possible); equal sizes go by leaf,
    then by place in it, equal loads to the lowest rank, so all ranks that compute it agree.
    """
    order = sorted(
        (-run.nbytes, number, place) for number, (runs, _) in enumerate(leaves) for place, run in enumerate(runs)
    )
    least = _LeastLoaded(load)
    for _, number, place in order:
        runs, writers = leaves[number]
        run = runs[place]
        for pieces, holders in run.steps:
            if holders.shape == (1, load.size):
                writers[pieces] = least.take(run.nbytes)
                continue
            writer = holders[np.arange(pieces.size), np.argmin(load[holders], axis=1)]
            load[writer] += run.nbytes
            writers[pieces] = writer


class _LeastLoaded:
    """The least loaded of all ranks, without looking at all of them each time."""

    def __init__(self, load: Int64s) -> None:
        self._load = load
        self._heap: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int:
        """Return the rank and add to its load."""
        if not self._heap:
            self._heap = [(load, rank) for rank, load in enumerate(self._load.tolist())]
            heapq.heapify(self._heap)
        # Loads only grow, also behind the heap's back: an entry that is too low is put right when it comes up.
        while True:
            known, rank = self._heap[0]
            load = int(self._load[rank])
            if known == load:
                break
            heapq.heapreplace(self._heap, (load, rank))
        self._load[rank] += nbytes
        heapq.heapreplace(self._heap, (load + nbytes, rank))
        return rank


def _steps(pieces: Int64s, ranks: Int64s, bounds: Int64s) -> list[tuple[Int64s, Int64s]]:
    """Cut pieces of one size into steps: the first piece of each box, then the second of each, and so on.

    Where a rank holds several of the boxes, each piece is a step of its own.
    """
    boxes, first, box_of = np.unique(bounds[pieces, 0], return_index=True, return_inverse=True)
    ends = bounds[pieces[first], 1]
    width = ends - boxes
    holders = ranks[np.concatenate([np.arange(*span) for span in zip(boxes.tolist(), ends.tolist(), strict=True)])]
    if (width != width[0]).any() or np.unique(holders).size != holders.size:
        return [(pieces[i : i + 1], ranks[slice(*bounds[piece])][None]) for i, piece in enumerate(pieces.tolist())]
    table = holders.reshape(boxes.size, int(width[0]))
    by_box = np.argsort(box_of, kind="stable")
    counts = np.bincount(box_of)
    turn = np.empty(pieces.size, np.int64)
    turn[by_box] = np.arange(pieces.size) - np.repeat(np.cumsum(counts) - counts, counts)
    steps = []
    for number in range(int(counts.max())):
        now = np.flatnonzero(turn == number)
        steps.append((pieces[now], table[box_of[now]]))
    return steps
