"""Which parameters of optimizers stand for parts of others: found by the runtime's module, asked for by optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ckptengine.torch.flat import FlatPart

__all__ = ["any_parts", "note", "parts_of", "remember"]

_made: Any = WeakIdKeyDictionary()
"""By flat parameter: where its buffer lay, and the parts that were made of it."""
_parts: Any = WeakIdKeyDictionary()
"""By parameter that an optimizer may have: its parts; a flat parameter has several."""


def remember(
    flat: torch.Tensor, make: Callable[[], list[FlatPart]], buffer: torch.Tensor | None = None
) -> list[FlatPart]:
    """Return the parts of a flat parameter, the same ones for as long as its buffer stays where it is."""
    lies = flat.detach() if buffer is None else buffer
    place = lies.data_ptr(), lies.numel(), lies.dtype, lies.device
    known = _made.get(flat)
    if known is None or known[0] != place:
        known = _made[flat] = (place, make())
    parts: list[FlatPart] = known[1]
    note(flat, parts)
    return parts


def note(parameter: Any, parts: list[FlatPart]) -> None:
    """Note of what a parameter of an optimizer is the parts."""
    _parts[parameter] = parts


def parts_of(parameter: Any) -> list[FlatPart] | None:
    """Return the parts that an optimizer's parameter stands for; None for a usual one.

    It is known once the module that knows has been asked for its values.
    """
    found: list[FlatPart] | None = _parts.get(parameter) if len(_parts) else None
    return found


def any_parts() -> bool:
    """Whether any parameter of the process is known to stand for parts."""
    return len(_parts) > 0
