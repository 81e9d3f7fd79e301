"""The order of records that lie in files which are read from front to back."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.data.order import MAX_LENGTH, Order, Shuffled

__all__ = ["Lanes", "lanes_from", "pack_counts", "unpack_counts"]

Numbers = NDArray[np.int64]

_MAX_SHARDS = 1 << 24


class Lanes(Order):
    """Files in a pseudo-random order, cut into lanes of equal length that are read side by side.

    The records of an epoch, file after file in the epoch's order, are one sequence. It is cut into `lanes` parts of
    equal length, up to one round's share, wherever the cut falls, also inside a file. A round is `block` positions;
    lane l has the positions from l·block//lanes to (l+1)·block//lanes - 1 of each round, and there gives its next
    records in turn. What is left for the last round is dealt in the same way: lane l gets its positions
    from l·rest//lanes on. So each record comes once, no lane runs out before the others, and a rank that has the same
    part of every round reads the same lanes from front to back.

    `counts` are the files' numbers of records, `names` any text that identifies the files. A record's sample number is
    its place among all records, the files in their given order. Memory is needed for each file, none for each record.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        block: int,
        lanes: int,
        names: str = "",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        numbers = [operator.index(count) for count in counts]
        self.length = sum(numbers)
        if any(count < 0 for count in numbers) or not 1 <= self.length <= MAX_LENGTH:
            raise ValueError(f"{len(numbers)} shards with {self.length} records: from 1 to 2**62 records are possible")
        self.block, self.lanes = operator.index(block), operator.index(lanes)
        if not 1 <= self.lanes <= self.block < 1 << 31:
            raise ValueError(f"lanes={lanes} over rounds of {block} records: give from 1 to as many lanes as records")
        self.names, self.seed, self.shuffle = names, operator.index(seed), bool(shuffle)
        self._permutation = Shuffled(len(numbers), self.seed)
        self._counts = np.array(numbers, np.int64)
        self._first = np.concatenate(([0], np.cumsum(self._counts)))  # sample number of each file's first record
        self._rounds, self._rest = divmod(self.length, self.block)
        self._epoch = -1
        self._files = self._starts = np.empty(0, np.int64)

    def at(self, epoch: int, positions: Numbers) -> Numbers:
        """Return the sample numbers at positions of an epoch."""
        _, files, records = self.places(epoch, positions)
        return self._first[files] + records

    def places(self, epoch: int, positions: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Return lane, file (its number in the given order) and record (its number in the file) of each position.

        `positions` is one-dimensional int64. Raises `ValueError` where one lies outside of the epoch.
        """
        positions = np.asarray(positions)
        if positions.dtype != np.int64 or positions.ndim != 1:
            raise ValueError(f"positions are one-dimensional int64, not {positions.dtype} of shape {positions.shape}")
        if positions.size and (positions.min() < 0 or positions.max() >= self.length):
            raise ValueError(f"positions {positions.min()} to {positions.max()}: an epoch has {self.length} samples")
        self._turn_to(epoch)
        lanes, places = self._in_sequence(positions)
        turns = np.searchsorted(self._starts, places, "right") - 1
        return lanes, self._files[turns], places - self._starts[turns]

    def describe(self) -> dict[str, Any]:
        """Return kind, length, what identifies the files, and how they are read."""
        return {
            "kind": "lanes",
            "length": self.length,
            "counts": pack_counts(self._counts.tolist()),
            "names": self.names,
            "block": self.block,
            "lanes": self.lanes,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _in_sequence(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Return each position's lane, and its place in the sequence of all records.

        Lane l begins at rounds · (l·block//lanes) + l·rest//lanes: all before it have had their share of each round.
        """
        rounds, slots = np.divmod(positions, self.block)
        whole = rounds < self._rounds
        # The last lane that begins at or before a slot of a round of so many.
        lanes = ((slots + 1) * self.lanes - 1) // np.where(whole, self.block, max(1, self._rest))
        begin, end = lanes * self.block // self.lanes, (lanes + 1) * self.block // self.lanes
        within = lanes * self._rest // self.lanes + rounds * (end - begin) + slots - begin
        return lanes, np.where(whole, self._rounds * begin + within, self._rounds * end + slots)

    def _turn_to(self, epoch: int) -> None:
        epoch = operator.index(epoch)
        if epoch == self._epoch:
            return
        files = np.arange(len(self._counts), dtype=np.int64)
        if self.shuffle:
            files = self._permutation.at(epoch, files)
        self._files = files[self._counts[files] > 0]
        self._starts = np.concatenate(([0], np.cumsum(self._counts[self._files])[:-1]))
        self._epoch = epoch


def pack_counts(counts: Iterable[int]) -> list[list[int]]:
    """Return numbers as pairs of a number and how many times in a row it comes: most data sets have equal shards."""
    return [[count, sum(1 for _ in same)] for count, same in itertools.groupby(counts)]


def unpack_counts(packed: object) -> list[int]:
    """Return the numbers that `pack_counts` packed; raises `ValueError` for anything else."""
    if not isinstance(packed, list) or not packed:
        raise ValueError(f"numbers of records are pairs of a number and its repeats, not {packed!r:.80}")
    counts: list[int] = []
    for pair in packed:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(n) is not int or n < 0 for n in pair):
            raise ValueError(f"numbers of records are pairs of a number and its repeats, not {pair!r:.80}")
        if len(counts) + pair[1] > _MAX_SHARDS:
            raise ValueError(f"more than {_MAX_SHARDS} shards")
        counts += [pair[0]] * pair[1]
    return counts


def lanes_from(length: int, counts: object, names: str, block: int, lanes: int, seed: int, shuffle: bool) -> Lanes:
    """Return the order that `Lanes.describe` gave these of, as they are in a checkpoint; raises `ValueError`."""
    order = Lanes(unpack_counts(counts), block=block, lanes=lanes, names=names, seed=seed, shuffle=shuffle)
    if order.length != length:
        raise ValueError(f"shards of {order.length} records in all, described as {length}")
    return order
