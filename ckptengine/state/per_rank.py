"""State that differs by rank on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["PerRank", "Ranks", "Resize"]

Resize = Callable[[list[Any], int, int], Any]
Ranks = Callable[[int, int, int], Iterable[int]]


class PerRank:
    """Mark a part of the state that differs by rank: every rank's is saved, and each rank gets its own back.

    - `value`: any state value (plain, tensor, dict, object with `state_dict`). A load fills it in place if it can, and
      sets `.value` otherwise.
    - `resize(saved, rank, world_size)`: called at another world size with the values of all ranks that saved, in the
      order of ranks (objects as what their `state_dict` returned); returns this rank's value. Without it a load at
      another world size raises `LoadMismatchError`.
    - `ranks(saved_world_size, rank, world_size)`: returns the ranks whose values `resize` gets, so that what a rank
      reads need not grow with their number. `resize` is then called at every world size.

    Raises `ValueError` for `ranks` without `resize`.
    """

    __slots__ = ("ranks", "resize", "value")

    def __init__(self, value: Any, resize: Resize | None = None, ranks: Ranks | None = None) -> None:
        if ranks is not None and resize is None:
            raise ValueError("PerRank: `ranks` says whose values `resize` gets; pass `resize` too")
        self.value = value
        self.resize = resize
        self.ranks = ranks

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"
