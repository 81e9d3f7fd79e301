"""The metrics that the training gives with a checkpoint: numbers by name, in its manifest."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

__all__ = ["check_names", "checked_metrics"]


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
