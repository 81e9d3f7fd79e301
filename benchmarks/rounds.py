"""Fair comparison on a noisy machine: interleaved rounds, medians, ratios within rounds.

Each round takes every subject once, in an order that moves on by one from round to round, so that a slow minute falls
on all of them and nobody always follows the same neighbour. Rounds that warm up are not counted. Ratios are taken
within a round, and their median over the rounds is what is compared with a target.
"""

import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and largest of some measurements, in their unit."""

    median: float
    least: float
    most: float

    def text(self) -> str:
        """Return "median (least–most)", with more digits where they are small."""
        digits = 3 if abs(self.median) < 0.1 else 2
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}–{self.most:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each round; both must have all rounds."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over the rounds of the ratios within them."""
    return statistics.median(ratios(numerators, denominators))


def best_of(columns: Sequence[Sequence[float]]) -> list[float]:
    """Return the least value of each round over several subjects."""
    return [min(values) for values in zip(*columns, strict=True)]


def rotated(names: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Return the order of a round: one place further for each round."""
    start = number % len(names)
    return names[start:] + names[:start]


def interleaved(
    subjects: Mapping[str, Callable[[], Measured]], rounds: int, warmup: int = 1
) -> tuple[dict[str, list[Measured]], dict[str, str]]:
    """Measure all subjects in turn; return what each counted round gave, and the errors of those that failed.

    A subject that fails is left out of all further rounds and has no measurements: its name is in the errors.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in subjects}
    errors: dict[str, str] = {}
    names = tuple(subjects)
    for number in range(rounds + warmup):
        for name in rotated(names, number):
            if name in errors:
                continue
            gc.collect()
            progress(f"round {number + 1} of {rounds + warmup}{' (warms up)' if number < warmup else ''}: {name}")
            try:
                value = subjects[name]()
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"
                del measured[name]
                continue
            if number >= warmup:
                measured[name].append(value)
    return measured, errors


def progress(line: str) -> None:
    """Say what is being measured: in one line of a terminal, else line by line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)
