"""Which checkpoints are the best, by a metric that the training gave when they were saved."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptengine.catalog.listing import Entry
from ckptengine.catalog.manifest import Manifest

__all__ = ["Best", "check_names", "checked_best", "checked_metrics"]


@dataclass(frozen=True, slots=True)
class Best:
    """The `count` checkpoints whose `metric` is the lowest (`mode="min"`) or the highest (`"max"`).

    A checkpoint that was saved without the metric, or with one that is no finite number, is never among them. Of equal
    ones the newer is the better.
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

    def of(self, line: Iterable[tuple[Entry, Manifest]]) -> list[Entry]:
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


def check_names(metrics: Mapping[str, Any] | None) -> None:
    """Raise `TypeError` for what can't be metrics; no value is read, for that may wait for a device."""
    if metrics is None:
        return
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and name for name in metrics):
        raise TypeError(f"metrics={metrics!r}: give a dict of names and numbers, such as {{'loss': 0.1}}")
    for name, value in metrics.items():
        if not isinstance(value, numbers.Real) and not hasattr(value, "item"):
            raise TypeError(_no_number(name, value))


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Return metrics as the manifest takes them: numbers, None for one that is not finite.

    Takes numbers and what has one as its `item()`, such as a tensor or an array of one element. Raises `TypeError`.
    """
    check_names(metrics)
    found: dict[str, float | None] = {}
    for name, value in (metrics or {}).items():
        try:
            number = float(value if isinstance(value, numbers.Real) else value.item())
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(_no_number(name, value)) from None
        found[name] = number if math.isfinite(number) else None
    return found


def _no_number(name: str, value: Any) -> str:
    return f"metrics[{name!r}] is a {type(value).__name__}: give a number, or a tensor or array of one element"
