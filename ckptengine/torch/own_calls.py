"""Optimizers with calls of their own: which they are, and how they are handed a state without being taken apart."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from ckptengine.torch.inner import optimizers_within
from ckptengine.torch.spread import bare_optimizer

__all__ = ["hand_over", "loads_itself", "saves_itself"]


def saves_itself(optimizer: Any) -> bool:
    """Whether an optimizer's `state_dict` may hold other things than its parameters' state and its groups: its class,
    or a hook, has changed it, or there is state under names of its own.

    Of a ZeroRedundancyOptimizer the one inside counts.
    """
    optimizer = bare_optimizer(optimizer)
    return (
        type(optimizer).state_dict is not Optimizer.state_dict
        or "state_dict" in vars(optimizer)
        or any(vars(optimizer).get(f"_optimizer_state_dict_{when}_hooks") for when in ("pre", "post"))
        or str in map(type, getattr(optimizer, "state", ()))
    )


def loads_itself(optimizer: Any) -> bool:
    """Whether an optimizer's `load_state_dict` may do other things than to set its state and its groups."""
    optimizer = bare_optimizer(optimizer)
    return (
        saves_itself(optimizer)
        or type(optimizer).load_state_dict is not Optimizer.load_state_dict
        or "load_state_dict" in vars(optimizer)
        or any(vars(optimizer).get(f"_optimizer_load_state_dict_{when}_hooks") for when in ("pre", "post"))
    )


def hand_over(optimizer: Any, state: Any | None) -> None:
    """Call an optimizer's `load_state_dict`, with what it says itself where `state` is None.

    torch's own `load_state_dict` makes new lists, groups and state dicts, and casts state to the parameter's dtype.
    What shared those lists before (a wrapper and what it wraps) would from then on change something that nobody uses.
    So afterwards the old objects are there again, with the new contents; and state that was only cast has the dtype
    and the bits that were handed over.
    """
    before = [
        (holder, vars(holder).get("state"), vars(holder).get("param_groups")) for holder in optimizers_within(optimizer)
    ]
    exact = {id(old): _copied(old) for _, old, _ in before if old is not None} if state is None else None
    handed = {} if exact is not None else _handed(optimizer, state)
    optimizer.load_state_dict(optimizer.state_dict() if state is None else state)
    settled: dict[int, tuple[Any, Any]] = {}
    for holder, old_state, old_groups in before:
        for name, old in (("state", old_state), ("param_groups", old_groups)):
            new = vars(holder).get(name)
            if old is None or new is None or new is old:
                continue
            if id(new) not in settled:
                settled[id(new)] = (old, new)
                if name == "state":
                    _refill_state(old, new, handed if exact is None else exact[id(old)], exact is not None)
                else:
                    _refill_groups(old, new)
            vars(holder)[name] = settled[id(new)][0]


def _copied(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: dict(items) if isinstance(items, Mapping) else items for key, items in state.items()}


def _handed(optimizer: Any, state: Any) -> dict[Any, dict[Any, Any]]:
    """Return what each parameter was handed, where the state has torch's form."""
    handed: dict[Any, dict[Any, Any]] = {}
    if not (isinstance(state, Mapping) and isinstance(state.get("param_groups"), list)):
        return handed
    for group, packed in zip(getattr(optimizer, "param_groups", []), state["param_groups"], strict=False):
        for parameter, number in zip(group["params"], packed["params"], strict=False):
            items = state["state"].get(number)
            if isinstance(items, Mapping):
                handed[parameter] = dict(items)
    return handed


def _refill_state(
    old: MutableMapping[Any, Any], new: Mapping[Any, Any], handed: Mapping[Any, Any], exact: bool
) -> None:
    """Give the old state the new contents: `exact`, what was there stays; else what was only cast is as handed over."""
    contents = {}
    for key, items in new.items():
        mine = handed.get(key)
        if isinstance(mine, Mapping) and isinstance(items, Mapping):
            kept = {n: item for n, item in mine.items() if exact or (n in items and _only_cast(item, items[n]))}
            items = {**items, **kept}
        contents[key] = items
    old.clear()
    old.update(contents)


def _only_cast(handed: Any, now: Any) -> bool:
    if isinstance(handed, torch.Tensor) and isinstance(now, torch.Tensor):
        return handed.shape == now.shape and handed.dtype != now.dtype and handed.device == now.device
    return isinstance(handed, str)  # torch makes the text of a generator of it (2.13)


def _refill_groups(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    if len(old) != len(new):
        old[:] = new
        return
    for group, contents in zip(old, new, strict=True):
        for key in [key for key in group if key not in contents]:
            del group[key]
        for key, value in contents.items():
            here = group.get(key)
            if isinstance(here, torch.Tensor) and isinstance(value, torch.Tensor) and here.shape == value.shape:
                with torch.no_grad():
                    here.copy_(value)
            elif key != "params" or here is None:
                group[key] = value
