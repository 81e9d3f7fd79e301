"""The tensors that a state has, as patterns for those that the checkpoint has and the state has not yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptengine.schema.path import Path
from ckptengine.state.kinds import ROOT, Inspector, Kind

__all__ = ["is_optimizer_state", "live_tensors"]

_DEPTH = 8
"""How deep attributes and containers are looked into."""


def live_tensors(state: Mapping[str, Any], inspector: Inspector) -> list[tuple[Path, Any]]:
    """Return path and tensor of parameters and tensors of a state: those of modules and optimizers, in containers, and
    in the attributes of objects; each tensor once."""
    found: dict[int, tuple[Path, Any]] = {}
    for path, tensor in _look(state, (), inspector, set()):
        found.setdefault(id(tensor), (path, tensor))
    return list(found.values())


def _look(value: Any, path: Path, inspector: Inspector, seen: set[int]) -> Iterator[tuple[Path, Any]]:
    if len(path) > _DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    found = inspector.inspect(value, path) if path else ROOT
    if found.kind in (Kind.TENSOR, Kind.WRAPPED):
        yield path, value
    elif found.kind is Kind.MODULE:
        for entry in inspector.entries(value, found.adapter, path):
            if found.adapter.is_tensor(entry.value):
                yield (*path, entry.name), entry.value
    elif found.kind is Kind.OPTIMIZER:
        for number, group in enumerate(found.adapter.optimizer_groups(value)):
            for index, parameter in enumerate(group["params"]):
                yield (*path, number, index), parameter
    elif found.kind in (Kind.PER_RANK, Kind.DECLARED):
        yield from _look(value.value, path, inspector, seen)
    elif found.kind is Kind.DICT:
        for key, item in value.items():
            yield from _look(item, (*path, key), inspector, seen)
    elif found.kind is Kind.SEQUENCE:
        for number, item in enumerate(value):
            yield from _look(item, (*path, number), inspector, seen)
    elif found.kind is Kind.OBJECT:
        for name, item in getattr(value, "__dict__", {}).items():
            if inspector.holds_more(item):
                yield from _look(item, (*path, name), inspector, seen)


def is_optimizer_state(keys: Any) -> bool:
    """Whether a dict with these keys has the form of what an optimizer's `state_dict` returns."""
    return "state" in keys and "param_groups" in keys
