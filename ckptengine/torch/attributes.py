"""Numbers that modules and optimizers keep in plain attributes, which their `state_dict` leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ckptengine.torch.own_calls import saves_itself

__all__ = ["plain_attributes"]

_TORCHS = frozenset(("torch", "builtins", "typing", "abc"))
"""The packages whose classes torch's own are made of."""


def plain_attributes(value: Any) -> Iterator[tuple[str, int | float]]:
    """Yield the public int and float attributes of an optimizer, or of a module and those in it, by dotted names.

    Left out is what torch's own classes keep, and what has code of its own that says what it saves.
    """
    if not isinstance(value, torch.nn.Module):
        if not saves_itself(value):
            yield from _numbers(value, "")
        return
    if _says_itself(value):
        return
    for name, part in value.named_modules():
        if part is value or not _says_itself(part):
            yield from _numbers(part, f"{name}." if name else "")


def _numbers(owner: Any, prefix: str) -> Iterator[tuple[str, int | float]]:
    if _is_torchs(type(owner)):
        return
    for name, value in vars(owner).items():
        if type(value) in (int, float) and not name.startswith("_"):
            yield prefix + name, value


def _says_itself(module: torch.nn.Module) -> bool:
    """Whether a module has code that decides what of it is saved."""
    cls = type(module)
    return not _is_torchs(cls) and (
        cls.state_dict is not torch.nn.Module.state_dict
        or cls.get_extra_state is not torch.nn.Module.get_extra_state
        or cls._save_to_state_dict is not torch.nn.Module._save_to_state_dict
        or bool(module._state_dict_hooks)
    )


def _is_torchs(cls: type) -> bool:
    return all(base.__module__.partition(".")[0] in _TORCHS for base in cls.__mro__)
