"""How a state is to be filled."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True, slots=True)
class Options:
    """Who loads, and what the caller allows: `cast` other dtypes, without `strict` what does not fit."""

    rank: int
    world_size: int
    cast: bool
    strict: bool
