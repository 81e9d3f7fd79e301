"""State that differs by rank on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["PerRank", "Resize"]

Resize = Callable[[list[Any], int, int], Any]


class PerRank:
    """Marks a part of the state that each rank has its own of: every rank's is kept, and each gets its own
    back.

    Takes any state value (plain, tensor, dict, object with `state_dict`), which `value` gives back; loading
    fills it in place where it can, and sets `value` otherwise. At another world size loading raises
    `LoadMismatchError` unless `resize` is given: `resize(saved, rank, world_size)` gets the values of all
    ranks that saved, in their order (objects as what `state_dict` gave), and returns this rank's.
    """

    __slots__ = ("resize", "value")

    def __init__(self, value: Any, resize: Resize | None = None) -> None:
        self.value = value
        self.resize = resize

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"
