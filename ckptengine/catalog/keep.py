"""Which committed checkpoints are kept: small rules, each of which keeps some of the line that led to the newest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ckptengine.catalog.listing import Entry
from ckptengine.catalog.manifest import Manifest

__all__ = ["Best", "Keep", "KeepEvery", "KeepLast", "KeepRule", "KeepSteps", "checked_best", "checked_steps"]


class KeepRule(Protocol):
    """Says which checkpoints are kept. Of several rules each adds what it keeps; the newest is kept in any case."""

    def kept(self, line: Sequence[tuple[Entry, Manifest]]) -> Iterable[Entry]:
        """Return what to keep of the checkpoints along the parents, which come newest first."""
        ...


Keep = tuple[KeepRule, ...] | Mapping[str, tuple[KeepRule, ...]]
"""The rules of all tiers, or each tier's own; a tier without any keeps all."""


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest `count` checkpoints. Raises `TypeError` or `ValueError` unless it is a whole number from 1."""

    count: int = 1

    def __post_init__(self) -> None:
        _check_count("count", self.count, "how many of the newest checkpoints to keep")

    def kept(self, line: Sequence[tuple[Entry, Manifest]]) -> Iterable[Entry]:
        """Return the newest `count`."""
        return [entry for entry, _ in line[: self.count]]


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Keep the checkpoints whose step is a multiple of `steps`. Raises the same errors as `KeepLast`."""

    steps: int

    def __post_init__(self) -> None:
        _check_count("steps", self.steps, "a number of steps")

    def kept(self, line: Sequence[tuple[Entry, Manifest]]) -> Iterable[Entry]:
        """Return those at the multiples."""
        return [entry for entry, _ in line if entry.step is not None and entry.step % self.steps == 0]


@dataclass(frozen=True, slots=True)
class KeepSteps:
    """Pin the checkpoints of these steps: `KeepSteps([1000, 5000])`.

    Raises `TypeError` or `ValueError` unless each step is a whole number from 0.
    """

    steps: Iterable[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_steps(self.steps))

    def kept(self, line: Sequence[tuple[Entry, Manifest]]) -> Iterable[Entry]:
        """Return those at the steps."""
        steps = frozenset(self.steps)
        return [entry for entry, _ in line if entry.step is not None and entry.step in steps]


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the `count` checkpoints whose `metric` is the lowest (`mode="min"`) or the highest (`mode="max"`).

    A checkpoint without the metric, or with a value that is not finite, is never kept by this rule. Of equal values the
    newer checkpoint counts as better. Raises `TypeError` or `ValueError` for other arguments.
    """

    metric: str
    count: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise TypeError(f"metric={self.metric!r}: give the name of a metric, such as 'loss'")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count={self.count!r}: give how many checkpoints to keep, a whole number from 1 on")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r}: give 'min' where lower is better, 'max' where higher is")

    def kept(self, line: Iterable[tuple[Entry, Manifest]]) -> list[Entry]:
        """Return the best of a line of checkpoints, the best first; `line` is newest first."""
        sign = 1 if self.mode == "min" else -1
        found = [
            (sign * value, number, entry)
            for number, (entry, manifest) in enumerate(line)
            if (value := manifest.metrics.get(self.metric)) is not None
        ]
        return [entry for *_, entry in sorted(found, key=lambda item: item[:2])[: self.count]]


def checked_best(name: str, value: Any) -> tuple[Best, ...]:
    """Return what `keep_best` and the like say: a metric's name, a `Best`, or several; raises `TypeError`."""
    if value is None:
        return ()
    values = [value] if isinstance(value, str | Best) else value
    if isinstance(values, Sequence) and all(isinstance(one, str | Best) for one in values):
        return tuple(Best(one) if isinstance(one, str) else one for one in values)
    raise TypeError(f"{name}={value!r}: give the name of a metric, a ckptengine.Best, or a list of these")


def checked_steps(steps: Any) -> frozenset[int]:
    """Return steps that a rule names; raises `TypeError` or `ValueError`."""
    if isinstance(steps, str) or not isinstance(steps, Iterable):
        raise TypeError(f"steps={steps!r}: give a list of steps, such as [1000, 5000]")
    found = frozenset(steps)
    for step in found:
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"steps has {step!r}: give whole numbers from 0 on")
        if step < 0:
            raise ValueError(f"steps has {step}: steps count from 0 on")
    return found


def _check_count(name: str, count: Any, what: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}={count!r}: give {what}, a whole number from 1 on")
    if count < 1:
        raise ValueError(f"{name}={count}: give {what}, a whole number from 1 on")
