"""Everything that objects hold, as flat records that can be compared bit for bit; knows nothing of the engine.

An object is followed through its `__dict__`, not through `state_dict`, so that what a `state_dict` leaves out is
seen as well. What can't be the same in two processes (functions, locks, the numbers of hooks) is told by name only.
"""

from __future__ import annotations

import random
import re
import types
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Record", "capture", "differences"]

Record = dict[str, str | bytes]
"""From a path to what is there: `(kind, ...)` as text, or a tensor's bytes."""

_SKIPPED = (
    # GradScaler makes its tensor from this when it is first used; what it restores is that tensor.
    re.compile(r"^scaler\._init_(scale|growth_tracker)$"),
    # bitsandbytes: constant tables for quantizing, and whether a warning was given.
    re.compile(r"\.name2qmap$|\._cpu_paged_warned$"),
    # The numbers of hooks come from a counter of the process; what is hooked is code.
    re.compile(r"_hooks(_with_kwargs|_always_called)?$"),
    # The step function that a scheduler has wrapped, and whether it was called: for a warning about their order.
    re.compile(r"\.(_opt_called|_step_count_warned|step)$"),
    re.compile(r"\._is_initial$"),
    # What FSDP2 keeps of its own beside a module: its memory for whole parameters, and its process groups.
    re.compile(r"\.__composable_api_"),
)

_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.ModuleType,
    type,
    property,
)


def capture(objects: Mapping[str, Any], parameters: Mapping[int, str]) -> Record:
    """Return what objects hold; `parameters` are names by `id` for parameters that are keys of dicts."""
    walk = _Walk(parameters)
    for name, value in objects.items():
        walk.visit(value, name)
    return walk.record


def differences(expected: Record, found: Record) -> list[str]:
    """Return a line for each path that is not the same in both."""
    lines = []
    paths = [*expected, *(path for path in found if path not in expected)]
    for path in sorted(paths, key=lambda path: path.endswith(" order")):
        if expected.get(path) != found.get(path):
            lines.append(f"{path}: {_words(expected.get(path))} became {_words(found.get(path))}")
    return lines


def _words(value: str | bytes | None) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bytes):
        return f"{len(value)} bytes {value[:8].hex()}…"
    return value if len(value) < 80 else value[:79] + "…"


class _Walk:
    def __init__(self, parameters: Mapping[int, str]) -> None:
        self.record: Record = {}
        self._parameters = parameters
        self._seen: dict[int, str] = {}
        self._inside: dict[int, str] = {}
        self._kept: list[Any] = []  # an id says something only while its object lives
        self._memory: dict[tuple[Any, ...], str] = {}

    def visit(self, value: Any, path: str) -> None:
        if any(pattern.search(path) for pattern in _SKIPPED):
            return
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum)):
            self.record[path] = f"{type(value).__name__} {value.hex() if isinstance(value, float) else value!r}"
        elif isinstance(value, (torch.dtype, torch.device, torch.Size, range, slice)):
            self.record[path] = repr(value)
        elif isinstance(value, _CODE) or value is Ellipsis or value is NotImplemented:
            self.record[path] = f"code {getattr(value, '__qualname__', type(value).__name__)}"
        elif isinstance(value, (weakref.ref, weakref.ProxyTypes)):
            self.record[path] = "weak reference"
        elif isinstance(value, (Mapping, list, tuple, deque)):
            self._container(value, path)
        elif id(value) in self._seen and not isinstance(value, torch.Tensor):
            self.record[path] = f"the same as {self._seen[id(value)]}"
        else:
            self._seen[id(value)] = path
            self._kept.append(value)
            self._visit_new(value, path)

    def _visit_new(self, value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value, path)
        elif isinstance(value, np.ndarray):
            self.record[path] = f"array {value.dtype} {value.shape}"
            self.record[f"{path} bytes"] = value.tobytes()
        elif isinstance(value, np.generic):
            self.record[path] = f"{value.dtype} {value!r}"
        elif isinstance(value, torch.Generator):
            self.record[path] = value.get_state().numpy().tobytes()
        elif isinstance(value, random.Random):
            self.record[path] = repr(value.getstate())
        elif isinstance(value, (set, frozenset)):
            self.record[path] = f"{type(value).__name__} {sorted(map(self._key, value))}"
        else:
            self._object(value, path)

    def _container(self, value: Any, path: str) -> None:
        """What is in one is compared wherever it is; that two are one says nothing unless it holds itself."""
        if id(value) in self._inside:
            self.record[path] = f"inside of {self._inside[id(value)]}"
            return
        self._inside[id(value)] = path
        if isinstance(value, Mapping):
            items = [(self._key(key), item) for key, item in value.items()]
            # torch's own `load_state_dict` adds this key, with the value that a missing one means.
            if path.endswith(".defaults") and not value.get("differentiable"):
                items = [(key, item) for key, item in items if key != "differentiable"]
            self._items(value, items, path)
        else:
            self._items(value, [(str(number), item) for number, item in enumerate(value)], path)
        del self._inside[id(value)]

    def _items(self, value: Any, items: Sequence[tuple[str, Any]], path: str) -> None:
        limit = f" of at most {value.maxlen}" if isinstance(value, deque) else ""
        keys = f" {sorted(key for key, _ in items)}" if isinstance(value, Mapping) else f" {len(items)}"
        self.record[path] = f"{type(value).__name__}{limit}{keys}"
        if isinstance(value, Mapping):
            # torch's own `load_state_dict` puts a group's parameters at its end.
            self.record[f"{path} order"] = f"{[key for key, _ in items if key != 'params']}"
        for key, item in items:
            self.visit(item, f"{path}.{key}")
        if isinstance(value, dict) and type(value) is not dict and hasattr(value, "__dict__"):
            for key, item in vars(value).items():
                self.visit(item, f"{path}.{key}")

    def _object(self, value: Any, path: str) -> None:
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            names = kind.__dict__.get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if hasattr(value, name) and not name.startswith("__"):
                    attributes[name] = getattr(value, name)
        self.record[path] = f"object {type(value).__qualname__}"
        for name, item in attributes.items():
            self.visit(item, f"{path}.{name}")

    def _key(self, key: Any) -> str:
        if isinstance(key, torch.Tensor):
            return self._parameters.get(id(key), "a tensor of no module")
        if type(key) is int and key in self._parameters:
            return f"the id of {self._parameters[key]}"
        if isinstance(key, (str, int, float, bool, tuple, Enum, bytes)) or key is None:
            return f"{key}" if isinstance(key, str) else f"{key!r}"
        if isinstance(key, type):
            return key.__qualname__
        return self._seen.get(id(key), f"a {type(key).__qualname__}")

    def _tensor(self, tensor: torch.Tensor, path: str) -> None:
        what = [type(tensor).__name__, str(tensor.dtype), str(tuple(tensor.shape)), str(tensor.device)]
        what.append("needs grad" if tensor.requires_grad else "")
        self.record[path] = " ".join(what)
        local = getattr(tensor, "_local_tensor", None)
        if local is not None and hasattr(tensor, "placements"):
            self.record[f"{path} placed"] = f"{tensor.placements} on {tensor.device_mesh}"
            self.visit(local, f"{path} local")
        elif is_traceable_wrapper_subclass(tensor):
            inner, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            self.record[f"{path} context"] = repr(context)
            for name in inner:
                self.visit(getattr(tensor, name), f"{path}.{name}")
        else:
            self._bytes(tensor.detach(), path)
        if tensor.is_leaf and tensor.grad is not None:
            self.visit(tensor.grad, f"{path} grad")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and local is None:
            for name, item in getattr(tensor, "__dict__", {}).items():
                self.visit(item, f"{path}.{name}")

    def _bytes(self, tensor: torch.Tensor, path: str) -> None:
        if tensor.is_quantized:
            self.record[f"{path} scheme"] = f"{tensor.qscheme()} {tensor!r}"
            tensor = tensor.int_repr()
        if tensor.layout is not torch.strided:
            self.record[f"{path} layout"] = str(tensor.layout)
            tensor = tensor.to_dense()
        if tensor.numel() == 0:
            return
        self.record[f"{path} strides"] = str(_strides(tensor))
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first = self._memory.setdefault(memory, path)
        if first != path:
            self.record[f"{path} memory"] = f"that of {first}"
        # A copy: torch never again resizes memory that numpy has seen, and FSDP2 has to.
        flat = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
        self.record[f"{path} bytes"] = flat.view(torch.uint8).numpy().tobytes()


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those of a dimension of one element say nothing."""
    return tuple(stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if length > 1)
