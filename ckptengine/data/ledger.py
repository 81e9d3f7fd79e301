"""The record of which positions of which epoch went into which global batch, run-length encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_RUNS", "GlobalBatch", "Ledger", "Run"]

MAX_RUNS = 1 << 22
"""Runs that a ledger may have as it is stored, equal epochs once; more are refused, so that no forged one exhausts the
memory."""

_MAX_NUMBER = 1 << 63


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What all ranks together use in one step of the optimizer.

    `number` is the count of global batches before it since the start of the run. It has the positions from `begin` to
    before `end` of an epoch's order, and `padding` more from the epoch's start on.
    """

    number: int
    epoch: int
    begin: int
    end: int
    padding: int = 0

    @property
    def size(self) -> int:
        """Samples of all ranks together, padding included."""
        return self.end - self.begin + self.padding


@dataclass(frozen=True, slots=True)
class Run:
    """Global batches of one size that follow each other in one epoch and one life of the job.

    Batches `first` to `last` (both included) have the positions from `begin` to before `end`, in equal parts, and
    `padding` more of the epoch's start in the last of them. A run of no batch (`last` is `first - 1`) says that the
    positions were left out on purpose, at the epoch's end (`last="drop"`). `life` counts how often the cursor had been
    loaded before.
    """

    first: int
    last: int
    epoch: int
    begin: int
    end: int
    padding: int
    world_size: int
    life: int

    @property
    def batches(self) -> int:
        """How many global batches there are."""
        return self.last - self.first + 1

    @property
    def samples(self) -> int:
        """How many samples of the epoch were used, padding not counted."""
        return self.end - self.begin if self.batches else 0

    def shifted(self, epochs: int, batches: int) -> Run:
        """Return the same run in a later epoch."""
        place = self.first + batches, self.last + batches, self.epoch + epochs
        return Run(*place, self.begin, self.end, self.padding, self.world_size, self.life)

    def continues_as(self, other: Run) -> bool:
        """Whether another run is this one, or this one with further batches."""
        if self == other:
            return True
        if not 0 < self.batches < other.batches or self.padding:
            return False
        grown = dataclasses.replace(other, last=self.last, end=self.end)
        return grown == self and (self.end - self.begin) * other.batches == (other.end - other.begin) * self.batches


class _Chapter:
    """The runs of one epoch in one life, and in how many epochs in a row they are the same."""

    __slots__ = ("repeats", "runs")

    def __init__(self, runs: list[Run], repeats: int = 1) -> None:
        self.runs, self.repeats = runs, repeats

    @property
    def batches(self) -> int:
        return sum(run.batches for run in self.runs)

    def unfolded(self) -> Iterator[Run]:
        batches = self.batches
        for number in range(self.repeats):
            for run in self.runs:
                yield run.shifted(number, number * batches) if number else run

    def is_next_of(self, before: _Chapter) -> bool:
        batches = before.batches
        shifted = [run.shifted(before.repeats, before.repeats * batches) for run in before.runs]
        return self.repeats == 1 and shifted == self.runs


class Ledger:
    """The runs so far, from the start of training; equal epochs that follow each other are kept once."""

    def __init__(self) -> None:
        self._chapters: list[_Chapter] = []

    def add(self, batch: GlobalBatch, world_size: int, life: int) -> None:
        """Note that a global batch was used."""
        self._add(Run(batch.number, batch.number, batch.epoch, batch.begin, batch.end, batch.padding, world_size, life))

    def leave_out(self, number: int, epoch: int, begin: int, end: int, world_size: int, life: int) -> None:
        """Note that the last positions of an epoch are left out on purpose; `number` is the next batch's."""
        self._add(Run(number, number - 1, epoch, begin, end, 0, world_size, life))

    def _add(self, new: Run) -> None:
        runs = self._chapters[-1].runs if self._chapters and self._chapters[-1].repeats == 1 else []
        last = runs[-1] if runs else None
        if last is None or (last.epoch, last.life) != (new.epoch, new.life):
            self._chapters.append(_Chapter([new]))
            return
        follows = new.first == last.last + 1 and new.begin == last.end and last.world_size == new.world_size
        alike = last.end - last.begin == (new.end - new.begin) * last.batches and not (last.padding or new.padding)
        if follows and alike and new.batches and last.batches:
            runs[-1] = Run(last.first, new.last, last.epoch, last.begin, new.end, 0, last.world_size, last.life)
        else:
            runs.append(new)

    def close_epoch(self) -> None:
        """Note that the epoch is over: where it went as the one before, both are kept as one."""
        if len(self._chapters) > 1 and self._chapters[-1].is_next_of(self._chapters[-2]):
            self._chapters.pop()
            self._chapters[-1].repeats += 1

    def __len__(self) -> int:
        """Return how many runs `runs` yields."""
        return sum(chapter.repeats * len(chapter.runs) for chapter in self._chapters)

    def runs(self) -> Iterator[Run]:
        """Yield all runs in the order of the batches; of equal epochs each one's."""
        for chapter in self._chapters:
            yield from chapter.unfolded()

    def plain(self) -> list[Any]:
        """Return the ledger as lists of integers: for each chapter its repeats and its runs (the fields of `Run`)."""
        return [
            [chapter.repeats, *(list(dataclasses.astuple(run)) for run in chapter.runs)] for chapter in self._chapters
        ]

    @classmethod
    def from_plain(cls, value: Any) -> Ledger:
        """Return the ledger that `plain` gave; raises `ValueError` where it is none."""
        ledger = cls()
        stored = 0
        for chapter in _list(value, 0):
            repeats, *runs = _list(chapter, 2)
            if type(repeats) is not int or not 1 <= repeats < _MAX_NUMBER:
                raise ValueError(f"a ledger's chapter repeats {repeats!r:.60} times")
            stored += len(runs)
            if stored > MAX_RUNS:
                raise ValueError(f"the ledger has more than {MAX_RUNS} runs")
            ledger._chapters.append(_Chapter([_run(run) for run in runs], repeats))
        return ledger


def _list(value: Any, least: int) -> list[Any]:
    if not isinstance(value, list) or len(value) < least:
        raise ValueError(f"a ledger is made of lists, not of {value!r:.60}")
    return value


def _run(value: Any) -> Run:
    numbers = _list(value, 0)
    if len(numbers) != len(dataclasses.fields(Run)) or not all(
        type(n) is int and -1 <= n < _MAX_NUMBER for n in numbers
    ):
        raise ValueError(f"a run of a ledger has {len(dataclasses.fields(Run))} numbers, not {value!r:.100}")
    run = Run(*numbers)
    if min(run.first, run.epoch, run.begin, run.padding, run.life) < 0 or run.batches < 0 or run.world_size < 1:
        raise ValueError(f"this is no run of a ledger: {run}")
    if run.end < run.begin or (run.batches and (run.end - run.begin) % run.batches):
        raise ValueError(f"this is no run of a ledger: {run}")
    return run
