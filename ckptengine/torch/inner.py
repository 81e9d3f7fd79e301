"""Optimizers inside of optimizers."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["optimizers_within"]

_DEPTH = 4
"""How deep they are looked for."""


def optimizers_within(optimizer: Any) -> list[Any]:
    """Return an optimizer and those in its attributes, the inner ones first."""
    found: list[Any] = []
    _look(optimizer, found, 0)
    return found


def _look(value: Any, found: list[Any], depth: int) -> None:
    if depth > _DEPTH:
        return
    if isinstance(value, Optimizer):
        if any(one is value for one in found):
            return
        for item in vars(value).values():
            if isinstance(item, (Optimizer, list, tuple)) or (isinstance(item, dict) and item):
                _look(item, found, depth + 1)
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Optimizer):
                _look(item, found, depth + 1)
    elif isinstance(value, dict):
        for item in value.values():
            if isinstance(item, Optimizer):
                _look(item, found, depth + 1)
