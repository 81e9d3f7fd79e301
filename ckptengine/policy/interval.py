"""How far apart saves should be: given, or computed from what they cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = ["Auto", "optimal_interval", "seconds_of"]

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_DEFAULT_OVERHEAD = 0.01


@dataclass(frozen=True, slots=True)
class Auto:
    """Compute the interval between saves from their measured cost: `every=Auto(mtbf="6h")`.

    - `mtbf`: mean time between failures of the whole job, in seconds or as a time such as `"6h"`. The interval is then
      the one that loses the least time (Young 1974, Daly 2006; see `optimal_interval`).
    - `overhead`: the fraction of the time that saves may take, such as 0.01. The interval is then at least the cost of
      a save divided by it.

    With both, the longer interval counts. With neither, as for `every="auto"`, `overhead` is 0.01. Raises `ValueError`
    unless `mtbf` is a positive time and `overhead` is between 0 and 1.
    """

    mtbf: str | float | None = None
    overhead: float | None = None

    def __post_init__(self) -> None:
        if self.mtbf is not None and not (seconds_of(self.mtbf) or 0) > 0:
            raise ValueError(f'mtbf={self.mtbf!r}: give a number of seconds, or a time such as "6h"')
        if self.overhead is not None and not 0 < self.overhead < 1:
            raise ValueError(f"overhead={self.overhead!r}: give a part of the time between 0 and 1, such as 0.01")

    def __str__(self) -> str:
        return "as often as the cost of a save allows"

    def interval(self, cost: float, least: float) -> tuple[float, str]:
        """Return the seconds from the start of a save to that of the next, and the reason in words.

        `cost` is how many seconds of training a save takes, `least` is what the interval can't be below.
        """
        found = []
        mtbf = seconds_of(self.mtbf)
        if mtbf is not None:
            found.append((optimal_interval(cost, mtbf), f"a mean time between failures of {self.mtbf}"))
        overhead = _DEFAULT_OVERHEAD if mtbf is None and self.overhead is None else self.overhead
        if overhead is not None:
            found.append((cost / overhead, f"an overhead of at most {overhead:.3g}"))
        found.append((least, "the time until a save is durable"))
        return max(found)


def optimal_interval(cost: float, mtbf: float) -> float:
    """Return the interval between the starts of two saves that loses the least time, in seconds.

    Young's first-order optimum is sqrt(2 cost mtbf) (J. W. Young, "A first order approximation to the optimum
    checkpoint interval", Communications of the ACM 17(9), 1974). Daly's has two more terms, which matter where a
    save costs much compared to `mtbf`, and gives way to `mtbf` itself where cost >= 2 mtbf (J. T. Daly, "A higher
    order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22(3),
    2006, eq. 37). Daly's interval is the work between two saves; with the save itself it is the time between
    starts. That a save becomes durable later adds the same to every loss, so it doesn't move the optimum.
    """
    if cost >= 2 * mtbf:
        return mtbf + cost
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9)


def seconds_of(time: object) -> float | None:
    """Return a number, or a text such as `"90s"`, `"10min"`, `"2h"` or `"1d"`, as seconds; None for anything else."""
    if isinstance(time, int | float) and not isinstance(time, bool):
        return float(time)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", time) if isinstance(time, str) else None
    return None if match is None else float(match[1]) * _UNITS[match[2]]
