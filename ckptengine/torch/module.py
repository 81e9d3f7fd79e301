"""Modules: named parameters, buffers and extra state, without what wrappers add to the names."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from ckptengine.errors import StateError
from ckptengine.state.adapters import ModuleEntry
from ckptengine.state.leaf import Path, dotted

__all__ = ["load_module", "module_entries"]

# `torch.compile` and activation checkpointing; these names are nobody else's.
_PREFIXES = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def module_entries(module: torch.nn.Module, path: Path) -> list[ModuleEntry]:
    """Return a module's state in its order, by names as the bare module has them.

    Raises `StateError` for FullyShardedDataParallel (version 1), and where two entries have the same name.
    """
    _refuse_fsdp1(module, path)
    state = module.state_dict(keep_vars=True)  # before the ids: under FSDP2 this puts the sharded parameters back
    parameters = {id(parameter) for parameter in module.parameters()}
    buffers = {id(buffer) for buffer in module.buffers()}
    wrapped = _wrapped_children(module)
    entries: dict[str, ModuleEntry] = {}
    for key, value in state.items():
        name = _bare(key, wrapped)
        if name in entries:
            raise StateError(
                f"{dotted(path)}: both {entries[name].key!r} and {key!r} are called {name!r} without their "
                "wrappers; rename one of the submodules"
            )
        live = id(value) in parameters or id(value) in buffers
        entries[name] = ModuleEntry(name, key, value, id(value) not in parameters, live)
    return list(entries.values())


def load_module(module: torch.nn.Module, entries: Mapping[str, Any]) -> None:
    """Hand over extra state, and what hooks of the module make out of its tensors, by `load_state_dict`.

    What was filled in place is handed over too, so that hooks see the whole.
    """
    current = module.state_dict(keep_vars=True)
    state = OrderedDict({**current, **entries})
    state._metadata = getattr(current, "_metadata", None)  # type: ignore[attr-defined]
    module.load_state_dict(state, strict=False)


def _refuse_fsdp1(module: torch.nn.Module, path: Path) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in module.modules()):
        raise StateError(
            f"{dotted(path)}: FullyShardedDataParallel hides its parameters; use `fully_shard` (FSDP2) instead"
        )


def _wrapped_children(module: torch.nn.Module) -> frozenset[str]:
    """Return the full names of the modules inside DataParallel, DistributedDataParallel and AveragedModel."""
    kinds = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, AveragedModel)
    return frozenset(f"{name}.module".lstrip(".") for name, child in module.named_modules() if isinstance(child, kinds))


def _bare(key: str, wrapped: frozenset[str]) -> str:
    if not wrapped and not any(prefix in key for prefix in _PREFIXES):
        return key
    parts = key.split(".")
    return ".".join(
        part
        for index, part in enumerate(parts)
        if part not in _PREFIXES and ".".join(parts[: index + 1]) not in wrapped
    )
