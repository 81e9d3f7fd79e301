"""Modules with loading code of their own: which they are, and what becomes of what they are handed."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ckptengine.torch.deepspeed import is_engine
from ckptengine.torch.dtensor import is_dtensor

__all__ = ["hand_to_module", "module_loading", "same_value", "takes"]

_HARMLESS = ("torch.nn.", "torch.distributed.")
"""Where torch's own loading code lies that does nothing more to what is filled in place: it adds keys that old versions
did not have, takes wrappers' prefixes off, or (FSDP2) looks whether shards were replaced. The quantization code in
`torch.ao` does more."""


def module_loading(module: torch.nn.Module) -> frozenset[str] | None:
    """Return None where nothing but torch's own code would load a module or anything in it.

    Else the names of the submodules that override `_load_from_state_dict`: these may take tensors of other shapes than
    those they have. Hooks, and a `load_state_dict` of the module's class, count as code that must run.
    """
    if is_engine(module):
        return frozenset()  # its weights are made of its master weights
    adapting, own = set(), not _is_torchs(type(module).load_state_dict)
    for name, part in module.named_modules(remove_duplicate=False):
        if not _is_torchs(type(part)._load_from_state_dict):
            adapting.add(name)
        hooks = (getattr(part, f"_load_state_dict_{when}_hooks", {}) for when in ("pre", "post"))
        own = own or not all(_is_torchs(hook) for some in hooks for hook in some.values())
    return frozenset(adapting) if own or adapting else None


def _is_torchs(call: Any) -> bool:
    call = getattr(call, "hook", call)  # torch wraps hooks
    call = call.func if isinstance(call, functools.partial) else call
    where = getattr(call, "__module__", None) or type(call).__module__
    return f"{where}.".startswith(_HARMLESS)


@functools.lru_cache(maxsize=256)
def takes(call: Any, name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    parameters = inspect.signature(call).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def hand_to_module(
    module: torch.nn.Module, values: Mapping[str, Any], metadata: Any, entries: Mapping[str, Any]
) -> Iterable[str]:
    """Call a module's `load_state_dict` with its live values, and with `entries` in place of some.

    Returns the keys that the module says it does not take, or misses. Parameters stay the same objects: an optimizer
    has them, and other modules may be tied to them.
    """
    before = dict(module.named_parameters(remove_duplicate=False))
    state = OrderedDict({**values, **entries})
    state._metadata = metadata  # type: ignore[attr-defined]
    if takes(type(module).load_state_dict, "strict"):
        result: Any = module.load_state_dict(state, strict=False)
    else:
        result = module.load_state_dict(state)  # type: ignore[call-arg,unused-ignore]
    _keep_parameters(module, before)
    told = (*getattr(result, "unexpected_keys", ()), *getattr(result, "missing_keys", ()))
    return [key for key in dict.fromkeys(told) if key in state]


def _keep_parameters(module: torch.nn.Module, before: Mapping[str, torch.nn.Parameter]) -> None:
    for name, old in before.items():
        owner, _, key = name.rpartition(".")
        here = module.get_submodule(owner)._parameters
        new = here.get(key)
        if new is None or new is old:
            continue
        if (new.shape, new.dtype, is_dtensor(new)) == (old.shape, old.dtype, is_dtensor(old)):
            with torch.no_grad():
                old.copy_(new)
            here[key] = old


def same_value(one: Any, other: Any) -> bool:
    """Whether two values are the same bits."""
    if one is other:
        return True
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return type(one) is type(other) and bool(one == other)
    mine, theirs = (t.to_local() if is_dtensor(t) else t for t in (one.detach(), other.detach()))  # type: ignore[attr-defined]
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return False
    bits = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (mine, theirs)]
    return torch.equal(*bits)
