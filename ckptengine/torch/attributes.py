"""Counters that modules and optimizers keep in plain attributes, which their `state_dict` leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ckptengine.torch.deepspeed import is_engine, is_zero_optimizer
from ckptengine.torch.own_calls import saves_itself

__all__ = ["plain_counters"]

_TORCHS = frozenset(("torch", "builtins", "typing", "abc"))
"""The packages whose classes torch's own are made of."""
_SAVING = "state_dict", "get_extra_state", "_save_to_state_dict"


def plain_counters(value: Any) -> Iterator[tuple[str, Any, dict[str, int]]]:
    """Yield the public int attributes of an optimizer, or of a module and of each in it: name there, owner, numbers.

    Left out is what torch's own classes keep, and DeepSpeed's. So is, with all that is in it, what has code of its own
    that says what it saves.
    """
    if isinstance(value, torch.nn.Module):
        yield from _of_modules("", value, set())
    elif not (_is_torchs(type(value)) or is_zero_optimizer(value) or saves_itself(value)):
        yield "", value, _counters(value)


def _of_modules(name: str, module: torch.nn.Module, met: set[int]) -> Iterator[tuple[str, Any, dict[str, int]]]:
    if id(module) in met:
        return
    met.add(id(module))
    if not _is_torchs(type(module)) and not is_engine(module):
        if _says_itself(module):
            return
        if counters := _counters(module):
            yield name, module, counters
    for key, part in module._modules.items():
        if part is not None:
            yield from _of_modules(f"{name}.{key}" if name else key, part, met)


def _counters(owner: Any) -> dict[str, int]:
    return {key: number for key, number in vars(owner).items() if type(number) is int and not key.startswith("_")}


def _says_itself(module: torch.nn.Module) -> bool:
    """Whether a module has code that decides what of it is saved."""
    cls = type(module)
    return (
        any(getattr(cls, call) is not getattr(torch.nn.Module, call) for call in _SAVING)
        or "state_dict" in vars(module)
        or bool(module._state_dict_hooks)
    )


def _is_torchs(cls: type) -> bool:
    return all(base.__module__.partition(".")[0] in _TORCHS for base in cls.__mro__)
