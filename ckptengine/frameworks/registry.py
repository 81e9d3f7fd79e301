"""Which frameworks the process has: each adapter registers itself when its module is imported."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ckptengine.frameworks.adapter import Adapter
from ckptengine.frameworks.numpy import NumpyAdapter

__all__ = ["adapter_of_loader", "adapter_of_tensor", "adapters", "at_rest", "framework", "register"]

_MODULES = {"torch": "ckptengine.torch.adapter", "mindspore": "ckptengine.mindspore.adapter"}
"""Of each framework the module that registers its adapter, imported once the framework is."""

_registered: dict[str, Adapter] = {}


def register(adapter: Adapter) -> None:
    """Make an adapter known under its name; the last one of a name counts."""
    _registered[adapter.name] = adapter


register(NumpyAdapter())


def adapters() -> Sequence[Adapter]:
    """Return numpy's adapter and those of the frameworks that the process has imported; imports none."""
    for name, module in _MODULES.items():
        # Not while the framework itself is half imported.
        if name not in _registered and hasattr(sys.modules.get(name), "nn"):
            importlib.import_module(module)
    return list(_registered.values())


def framework(name: str) -> Adapter:
    """Return the adapter of a framework, which is imported if it is not yet; raises `ModuleNotFoundError`."""
    importlib.import_module(_MODULES[name])
    return _registered[name]


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """Let adapters keep, within a `with` block in which no module computes, what they find out about all tensors."""
    with contextlib.ExitStack() as stack:
        for adapter in adapters():
            stack.enter_context(adapter.at_rest())
        yield


def adapter_of_tensor(value: Any) -> Adapter | None:
    """Return the adapter that knows a value as its tensor, None where none does."""
    for adapter in adapters():
        if adapter.is_tensor(value):
            return adapter
    return None


def adapter_of_loader(value: Any) -> Adapter | None:
    """Return the adapter that knows a value as a data loader with a place of its own, None where none does."""
    for adapter in adapters():
        if adapter.is_stateful_loader(value):
            return adapter
    return None
