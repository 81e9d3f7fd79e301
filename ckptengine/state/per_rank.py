"""State that differs by rank on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["PerRank", "Ranks", "Resize"]

Resize = Callable[[list[Any], int, int], Any]
Ranks = Callable[[int, int, int], Iterable[int]]


class PerRank:
    """Marks a part of the state that each rank has its own of: every rank's is kept, and each gets its own
    back.

    Takes any state value (plain, tensor, dict, object with `state_dict`), which `value` gives back; loading
    fills it in place where it can, and sets `value` otherwise. At another world size loading raises
    `LoadMismatchError` unless `resize` is given: `resize(saved, rank, world_size)` gets the values of all
    ranks that saved, in their order (objects as what `state_dict` gave), and returns this rank's.

    With `ranks`, `resize` is called at every world size, and gets the values of those ranks only that
    `ranks(saved_world_size, rank, world_size)` returns: what a rank reads need not grow with their number.
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
