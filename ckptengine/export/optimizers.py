"""Optimizers' states with the names that other libraries have for parameters: numbers, or names within the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptengine.export.contents import Contents
from ckptengine.schema.path import Path, dotted

__all__ = ["with_numbers", "within_modules"]

Rename = Callable[[str], Any]


def with_numbers(nested: dict[Any, Any], contents: Contents) -> dict[Any, Any]:
    """Return nested dicts in which optimizers have parameters by number, as `torch.optim.Optimizer.state_dict`."""
    return _changed(nested, contents, lambda names: {name: number for number, name in enumerate(names)}.get)


def within_modules(nested: dict[Any, Any], contents: Contents) -> dict[Any, Any]:
    """Return nested dicts in which optimizers name their parameters as the module does that has them.

    These are the names of `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`.
    """
    prefixes = sorted((f"{dotted(path)}." for path in contents.modules), key=len, reverse=True)

    def shorten(name: str) -> str:
        prefix = next((one for one in prefixes if name.startswith(one)), "")
        return name[len(prefix) :]

    return _changed(nested, contents, lambda names: shorten)


def _changed(nested: dict[Any, Any], contents: Contents, how: Callable[[list[str]], Rename]) -> dict[Any, Any]:
    for path in contents.optimizers:
        nested = _at(nested, path, lambda optimizer: _renamed(optimizer, how))
    return nested


def _at(nested: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """Return nested containers with what lies at a path changed; where nothing lies there, as they are."""
    if not path:
        return change(nested)
    if not isinstance(nested, dict) or path[0] not in nested:
        return nested
    return {key: _at(item, path[1:], change) if key == path[0] else item for key, item in nested.items()}


def _renamed(optimizer: Any, how: Callable[[list[str]], Rename]) -> Any:
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        return optimizer
    rename = how([str(name) for group in groups for name in group["params"]])
    state = optimizer.get("state", {})
    if not isinstance(state, dict):
        return optimizer
    return {
        **optimizer,
        "state": {rename(str(name)): item for name, item in state.items()},
        "param_groups": [{**group, "params": [rename(str(name)) for name in group["params"]]} for group in groups],
    }
