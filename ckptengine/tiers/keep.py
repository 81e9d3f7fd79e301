"""How many checkpoints a tier keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptengine.catalog.best import Best

__all__ = ["Keep"]


@dataclass(frozen=True, slots=True)
class Keep:
    """Which committed checkpoints a tier keeps: the newest `last` (None: all), multiples of `every` steps, the best."""

    last: int | None
    every: int | None
    best: tuple[Best, ...] = ()

    @classmethod
    def of(
        cls,
        keep_last: int | Mapping[str, int] | None,
        every: int | None,
        best: tuple[Best, ...],
        name: str,
        names: set[str],
    ) -> Keep:
        """Return what users' options say of the tier `name`, of all `names`; raises `ValueError`."""
        if isinstance(keep_last, Mapping):
            unknown = sorted(set(keep_last) - names)
            if unknown:
                raise ValueError(f"keep_last names {', '.join(unknown)}: this run has {', '.join(sorted(names))}")
            last = keep_last.get(name)
        else:
            last = keep_last
        if last is not None and last < 1:
            raise ValueError(f"keep_last={keep_last}: keep at least one checkpoint, or None for all")
        if name == "memory" and isinstance(keep_last, Mapping) and last not in (None, 1):
            raise ValueError(f"keep_last={keep_last}: memory keeps 1, while the next one is made beside it")
        return cls(last, every, best)
