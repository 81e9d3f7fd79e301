"""What a ledger claims, checked: against the epochs, against the ledger before it, and against the samples' digests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptengine.data.digest import DIGEST_BITS, digest_of, hash_of
from ckptengine.data.ledger import Run
from ckptengine.data.mix import MASK
from ckptengine.data.order import Order

__all__ = ["Irregularity", "coverage", "digest_of_runs", "identify", "new_runs", "place_after", "samples_in"]

_BLOCK = 1 << 16
_MOST_SEARCHED = 1 << 25
"""Samples among which the one that explains a digest is looked for: some seconds, and 24 bytes for each of an epoch."""
_SHOWN = 5
_MODULUS = 1 << DIGEST_BITS


@dataclass(frozen=True, slots=True)
class Irregularity:
    """Positions `begin` to before `end` of an epoch that were not used once, but `times` times.

    It is the same in `epochs` epochs from `epoch` on. `batch` is the number of the global batch at which it shows:
    the first one after a gap, the repeating one. `samples` are the sample numbers at the first of the positions.
    """

    epoch: int
    epochs: int
    begin: int
    end: int
    times: int
    batch: int
    samples: tuple[int, ...]

    @property
    def text(self) -> str:
        """What happened, in words."""
        which = f"epoch {self.epoch}" if self.epochs == 1 else f"epochs {self.epoch} to {self.epoch + self.epochs - 1}"
        used = {0: "never used", 1: "used that an epoch does not have"}.get(self.times, f"used {self.times} times")
        count = self.end - self.begin
        text = f"{which}: {count} sample{'' if count == 1 else 's'} {used}, positions {self.begin} to {self.end - 1}"
        if self.samples:
            text += f", samples {', '.join(map(str, self.samples))}" + (", …" if count > len(self.samples) else "")
        return text


def coverage(runs: Iterable[Run], order: Order, epoch: int) -> list[Irregularity]:
    """Return where runs don't use each position once: in all epochs before `epoch`, and in it up to where they came.

    What was left out on purpose counts as used. Works on intervals: no memory is needed per sample.
    """
    by_epoch: dict[int, list[Run]] = {}
    for run in runs:
        by_epoch.setdefault(run.epoch, []).append(run)
    found: list[Irregularity] = []
    expected, after = 0, 0
    for number in sorted(by_epoch):
        own = by_epoch[number]
        if expected < number:
            found.append(_untouched(order, expected, number - expected, own[0].first))
        found += _uneven(own, order, number, order.length if number < epoch else max(run.end for run in own))
        expected, after = number + 1, max(run.last for run in own) + 1
    if expected < epoch:
        found.append(_untouched(order, expected, epoch - expected, after))
    return found


def _untouched(order: Order, epoch: int, epochs: int, batch: int) -> Irregularity:
    samples = _samples(order, epoch, 0, order.length)
    return Irregularity(epoch, epochs, 0, order.length, 0, batch, samples)


def _uneven(runs: list[Run], order: Order, epoch: int, upto: int) -> list[Irregularity]:
    """Sweep over the begins and ends of one epoch's intervals."""
    upto = min(upto, order.length)
    changes = {0: 0, upto: 0}
    for run in runs:
        changes[run.begin] = changes.get(run.begin, 0) + 1
        changes[run.end] = changes.get(run.end, 0) - 1
    places = sorted(changes)
    pieces: list[tuple[int, int, int]] = []
    times = 0
    for begin, end in itertools.pairwise(places):
        times += changes[begin]
        if times == (begin < upto):
            continue
        if pieces and pieces[-1][1:] == (begin, times) and begin != upto:
            pieces[-1] = pieces[-1][0], end, times
        else:
            pieces.append((begin, end, times))
    return [
        Irregularity(
            epoch, 1, begin, end, times, _batch_at(runs, begin, end, times), _samples(order, epoch, begin, end)
        )
        for begin, end, times in pieces
    ]


def _batch_at(runs: list[Run], begin: int, end: int, times: int) -> int:
    """Return the number of the batch that came back to positions, or of the first one after those left out."""
    if not times:
        return min((run.first for run in runs if run.begin >= end), default=max(run.last for run in runs) + 1)
    run = [run for run in runs if run.begin < end and run.end > begin][-1]
    size = (run.end - run.begin) // run.batches if run.batches else 1
    return run.first + max(0, begin - run.begin) // max(1, size)


def _samples(order: Order, epoch: int, begin: int, end: int) -> tuple[int, ...]:
    stop = min(end, begin + _SHOWN, order.length)
    return tuple(order.at(epoch, np.arange(begin, max(begin, stop), dtype=np.int64)).tolist())


def place_after(runs: Sequence[Run], length: int) -> tuple[int, int, int]:
    """Return the epoch, the position in it and the count of batches at which the next global batch begins."""
    if not runs:
        return 0, 0, 0
    last = runs[-1]
    place = (last.epoch + 1, 0) if last.end >= length else (last.epoch, last.end)
    return *place, last.last + 1


def new_runs(before: Sequence[Run], after: Sequence[Run]) -> list[Run] | int:
    """Return what a later ledger has more than an earlier one, or the number of the first run that was changed."""
    for number, run in enumerate(before):
        if number >= len(after):
            return number
        same = run == after[number]
        if not same and not (number == len(before) - 1 and run.continues_as(after[number])):
            return number
    if not before or before[-1] == after[len(before) - 1]:
        return list(after[len(before) :])
    grown = after[len(before) - 1]
    rest = dataclasses.replace(grown, first=before[-1].last + 1, begin=before[-1].end)
    return [rest, *after[len(before) :]]


def samples_in(runs: Iterable[Run]) -> int:
    """Return how many samples the runs handed out, padding included."""
    return sum(run.samples + run.padding for run in runs)


def _intervals(runs: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """Yield what the runs used, as epoch, begin and end, neighbours joined."""
    epoch, begin, end = 0, 0, 0
    for run in runs:
        if not run.samples:
            continue
        if (run.epoch, run.begin) != (epoch, end):
            if begin < end:
                yield epoch, begin, end
            epoch, begin = run.epoch, run.begin
        end = run.end
    if begin < end:
        yield epoch, begin, end


def digest_of_runs(runs: Sequence[Run], order: Order, progress: Callable[[int], None]) -> int:
    """Return the digest of all samples that the runs say were used; `progress` is told how many were hashed.

    A whole epoch needs no order, only the numbers of all samples; of a part the order is computed.
    """
    total = 0
    for epoch, begin, end in _intervals(runs):
        whole = (begin, end) == (0, order.length)
        total += sum(_digests(epoch, begin, min(end, order.length), None if whole else order, False, progress))
    for run in runs:
        for start in range(0, run.padding, order.length):
            stop = min(run.padding - start, order.length)
            total += sum(_digests(run.epoch, 0, stop, order, True, progress))
    return total % _MODULUS


def _digests(
    epoch: int, begin: int, end: int, order: Order | None, padding: bool, progress: Callable[[int], None]
) -> Iterator[int]:
    for start in range(begin, end, _BLOCK):
        samples = np.arange(start, min(end, start + _BLOCK), dtype=np.int64)
        yield digest_of(epoch, samples if order is None else order.at(epoch, samples), padding=padding)
        progress(len(samples))


def identify(difference: int, order: Order, epochs: Sequence[int]) -> str | None:
    """Return which sample explains a digest that is greater by `difference` than it should be, in words.

    One that was handed out once more, one that was not, or one that took the place of another of its epoch, among all
    samples of the given epochs; None where it is nothing of that, or there are too many to look at.
    """
    if order.length * len(epochs) > _MOST_SEARCHED:
        return None
    for epoch in epochs:
        upper, lower = hash_of(epoch, np.arange(order.length, dtype=np.int64))
        for signed, what in ((difference, "handed out once more"), (-difference, "not handed out")):
            high, low = divmod(signed % _MODULUS, 1 << 64)
            found = np.flatnonzero((upper == np.uint64(high)) & (lower == np.uint64(low)))
            if found.size:
                return f"sample {found[0]} of epoch {epoch} was {what}"
        # Of a pair the lower halves differ by the difference's lower half; those few are then looked at as a whole.
        wanted = lower + np.uint64(difference & MASK)
        for without in np.flatnonzero(np.isin(wanted, lower)):
            for instead in np.flatnonzero(lower == wanted[without]):
                if (_whole(upper, lower, instead) - _whole(upper, lower, without)) % _MODULUS == difference % _MODULUS:
                    return f"sample {instead} of epoch {epoch} was handed out in place of sample {without}"
    return None


def _whole(upper: NDArray[np.uint64], lower: NDArray[np.uint64], sample: np.intp) -> int:
    return (int(upper[sample]) << 64) + int(lower[sample])
