"""Modules: named parameters, buffers and extra state, without what wrappers add to the names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import ModuleEntry
from ckptengine.schema.path import Path, dotted
from ckptengine.torch.deepspeed import check_engine, engine_values, is_engine, refresh_weights
from ckptengine.torch.dtensor import is_dtensor
from ckptengine.torch.flat import is_flat
from ckptengine.torch.fsdp1 import check_fsdp1, check_whole, fsdp1_values, holds_fsdp1
from ckptengine.torch.metrics import check_metrics, metric_counters, metric_values, set_metric_counters
from ckptengine.torch.own_loading import hand_to_module, same_value, takes

__all__ = ["bare_name", "check_module", "load_module", "module_entries", "module_values"]

# `torch.compile`, activation checkpointing and FSDP1; these names are nobody else's.
_PREFIXES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_WRAPPERS = _PREFIXES | {"module"}


def module_values(module: torch.nn.Module) -> Mapping[str, Any]:
    """Return a module's state by its own keys, with its own parameters and buffers where they are in it.

    A class of its own may have a `state_dict` that knows no `keep_vars`: what it detaches is found again by its memory.
    What metrics count beside that is added. Raises `StateError` where it gives no dict.
    """
    return {**_own_values(module), **metric_counters(module)}


def _own_values(module: torch.nn.Module) -> Mapping[str, Any]:
    if holds_fsdp1(module):
        return fsdp1_values(module)
    if is_engine(module):
        return engine_values(module)
    call = type(module).state_dict
    if call is torch.nn.Module.state_dict or takes(call, "keep_vars"):
        values = module.state_dict(keep_vars=True)
    else:
        values = _attached(module.state_dict(), module)
    if not isinstance(values, Mapping):
        raise TypeError(f"it returned {type(values).__name__}, not a dict from names to values")
    return values


def _attached(values: Any, module: torch.nn.Module) -> Any:
    if not isinstance(values, Mapping):
        return values
    own = {_place(tensor): tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()}
    return {
        key: own.get(_place(value), value) if isinstance(value, torch.Tensor) and value.numel() else value
        for key, value in values.items()
    }


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common that are the same memory seen in the same way."""
    local = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local.data_ptr(), local.shape, local.stride(), local.dtype, tensor.shape


def module_entries(module: torch.nn.Module, path: Path, state: Mapping[str, Any]) -> list[ModuleEntry]:
    """Return a module's state in its order, by names as the bare module has them.

    `state` is what `module_values` gave: it was asked before the ids are taken, since under FSDP2 that puts the sharded
    parameters back.

    Raises `StateError` where two entries have the same name.
    """
    parameters = {id(parameter) for parameter in module.parameters()}
    buffers = {id(buffer) for buffer in module.buffers()}
    wrapped, of_metrics, counters = _wrapped_children(module), metric_values(module), metric_counters(module)
    entries: dict[str, ModuleEntry] = {}
    for key, value in state.items():
        name = _bare(key, wrapped)
        if name in entries:
            raise StateError(
                f"{dotted(path)}: both {entries[name].key!r} and {key!r} are called {name!r} without their "
                "wrappers; rename one of the submodules"
            )
        live = id(value) in parameters or id(value) in buffers or is_flat(value)
        buffer = id(value) not in parameters and key not in of_metrics and not is_flat(value)
        entries[name] = ModuleEntry(name, key, value, buffer, live, added=key in counters)
    return list(entries.values())


def load_module(module: torch.nn.Module, entries: Mapping[str, Any]) -> list[str]:
    """Have a module's own loading code run: `load_state_dict` with its live values and with `entries`, by its keys.

    `entries` are extra state, what its hooks make out of its tensors, and tensors of other shapes than those that are
    here. Returns the keys that it did not take, and under which there is something else than what it was handed.
    """
    if is_engine(module):
        refresh_weights(module.optimizer)
        return []
    counters = {key: entries[key] for key in metric_counters(module) if key in entries}
    entries = {key: value for key, value in entries.items() if key not in counters}
    values = _own_values(module)
    told = hand_to_module(module, values, getattr(values, "_metadata", None), entries)
    set_metric_counters(module, counters)
    if not told:
        return []
    now, handed = _own_values(module), {**values, **entries}
    return [key for key in told if key not in now or not same_value(now[key], handed[key])]


def check_module(module: torch.nn.Module, path: Path) -> None:
    """Raise `StateError` where a module's `state_dict` is not its state.

    That is FullyShardedDataParallel (version 1) around modules with loading code of their own, metrics of torchmetrics,
    which leave out their values unless they are told to keep them, and weights that bitsandbytes has quantized to 4
    bits.
    """
    if holds_fsdp1(module):
        check_fsdp1(module, path)
    check_whole(module, path)
    if is_engine(module):
        check_engine(module, path)
    check_metrics(module, path)
    for name, part in module.named_modules():
        if _is_quantized_to_4_bits(part):
            raise StateError(
                f"{dotted((*path, name) if name else path)}: the `quant_state` of bitsandbytes' {type(part).__name__} "
                "is not taken by its `load_state_dict`, so its weights could not be restored; put what is trained "
                "alone into the state (`{name: p for name, p in model.named_parameters() if p.requires_grad}`), and "
                "quantize the rest anew, of the weights that it was made of"
            )


def _is_quantized_to_4_bits(module: torch.nn.Module) -> bool:
    if not any(
        kind.__name__ in ("Linear4bit", "Embedding4bit") and kind.__module__.startswith("bitsandbytes.")
        for kind in type(module).__mro__
    ):
        return False
    weight = getattr(module, "weight", None)
    return any(getattr(one, "quant_state", None) is not None for one in (module, weight))


def _wrapped_children(module: torch.nn.Module) -> frozenset[str]:
    """Return the full names of the modules inside DataParallel, DistributedDataParallel and AveragedModel."""
    kinds = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, AveragedModel)
    return frozenset(f"{name}.module".lstrip(".") for name, child in module.named_modules() if isinstance(child, kinds))


def bare_name(name: str) -> str:
    """Return a name that `named_parameters()` of a module in wrappers gave, without the wrappers' parts.

    The module is not at hand: a submodule that the user has called `module` loses its part, too.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _bare(key: str, wrapped: frozenset[str]) -> str:
    if not wrapped and not any(prefix in key for prefix in _PREFIXES):
        return key
    parts = key.split(".")
    return ".".join(
        part
        for index, part in enumerate(parts)
        if part not in _PREFIXES and ".".join(parts[: index + 1]) not in wrapped
    )
