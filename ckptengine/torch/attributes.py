"""Numbers that modules and optimizers keep in plain attributes, which their `state_dict` leaves out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ckptengine.torch.own_calls import saves_itself

__all__ = ["plain_attributes"]

_TORCHS = frozenset(("torch", "builtins", "typing", "abc"))
"""The packages whose classes torch's own are made of."""


def plain_attributes(value: Any) -> Iterator[tuple[str, dict[str, int | float]]]:
    """Yield the public int and float attributes of an optimizer, or of a module and of each in it, with its name there.

    Left out is what torch's own classes keep, and what has code of its own that says what it saves.
    """
    cls: Any = type(value)
    if not isinstance(value, torch.nn.Module):
        if not _is_torchs(cls) and not saves_itself(value):
            yield "", _numbers(value)
        return
    if not _is_torchs(cls) and (_says_itself(cls) or value._state_dict_hooks):
        return
    for name, part in value.named_modules():
        cls = type(part)
        if not (_is_torchs(cls) or _says_itself(cls) or part._state_dict_hooks) and (numbers := _numbers(part)):
            yield name, numbers


def _numbers(owner: Any) -> dict[str, int | float]:
    return {
        name: value for name, value in vars(owner).items() if type(value) in (int, float) and not name.startswith("_")
    }


@functools.lru_cache(maxsize=1024)
def _says_itself(cls: Any) -> bool:
    """Whether a module's class has code that decides what of it is saved."""
    calls = ("state_dict", "get_extra_state", "_save_to_state_dict")
    return not _is_torchs(cls) and any(getattr(cls, call) is not getattr(torch.nn.Module, call) for call in calls)


@functools.lru_cache(maxsize=1024)
def _is_torchs(cls: type) -> bool:
    return all(base.__module__.partition(".")[0] in _TORCHS for base in cls.__mro__)
