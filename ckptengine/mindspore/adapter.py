"""MindSpore for the engine: tensors, parameters, cells, optimizers, loss scalers, dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor

from ckptengine.frameworks.adapter import Adapter, ModuleEntry, TensorKind, TensorView
from ckptengine.frameworks.registry import register
from ckptengine.mindspore import cell as _cell
from ckptengine.mindspore.group import group_ranks
from ckptengine.mindspore.tensor import (
    as_tensor,
    convert_tensor,
    dtype_name,
    fingerprints,
    mindspore_dtype,
    new_parameter,
    view_tensor,
)
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path

__all__ = ["MindSporeAdapter"]


class MindSporeAdapter(Adapter):
    """What `Adapter` asks, answered for MindSpore.

    Optimizers are cells there, so they are modules here: their state is filled in place and needs no names of ours.
    Nothing is copied after the call returns, since operators change memory without telling anybody.
    """

    name = "mindspore"

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a tensor or a parameter."""
        return isinstance(value, Tensor)

    def view(self, tensor: Any, path: Path, *, target: bool) -> TensorView:
        """Return dtype, shape and memory, after what is under way."""
        return view_tensor(tensor, path, target=target)

    def fingerprints(self, tensors: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Return addresses, shapes and dtypes, after what is under way."""
        return fingerprints(tensors)

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return a new tensor in host memory."""
        return as_tensor(np.zeros(shape, DTYPES[dtype].numpy), dtype)

    def convert(self, tensor: Any, buffers: Sequence[np.ndarray[Any, Any]], dtype: str) -> None:
        """Fill a tensor from host buffers of another dtype."""
        convert_tensor(tensor, buffers, dtype)

    def tensor_kind(self, tensor: Any) -> TensorKind:
        """Return name and `requires_grad` of a parameter."""
        if not isinstance(tensor, Parameter):
            return None
        return {"name": tensor.name, "grad": tensor.requires_grad}

    def kind_marks(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return `tensor_kind` of each."""
        return [self.tensor_kind(tensor) for tensor in tensors]

    def as_kind(self, tensor: Any, kind: TensorKind, path: Path) -> Any:
        """Return a parameter, or a plain tensor, with memory of its own: MindSpore copies what it makes one of."""
        view = self.view(tensor, path, target=False)
        if not isinstance(kind, dict):
            return self.empty(view.dtype, view.shape)
        return new_parameter(view.dtype, view.shape, str(kind.get("name")), bool(kind.get("grad")))

    def is_module(self, value: Any) -> bool:
        """Whether a value is a cell or a loss scaler."""
        return _cell.is_module(value)

    def module_entries(self, module: Any, path: Path, values: Mapping[str, Any]) -> list[ModuleEntry]:
        """Return a cell's parameters by their own names, and its buffers; an optimizer's without the weights."""
        return _cell.module_entries(module, path)

    def module_values(self, module: Any) -> dict[str, Any]:
        """Return the values of `module_entries`."""
        return _cell.module_values(module)

    def module_tensors(self, module: Any) -> Iterable[Any]:
        """Return a cell's parameters and buffers."""
        return [value for value in _cell.module_values(module).values() if self.is_tensor(value)]

    def state_owners(self, module: Any) -> Iterable[tuple[str, Any, Any]]:
        """Return what an optimizer keeps for its weights."""
        return _cell.state_owners(module)

    def group_ranks(self, group: Any) -> Sequence[int] | None:
        """Return the ranks of a group by its name."""
        return group_ranks(group) if isinstance(group, str) else None

    def load_module(self, module: Any, entries: Mapping[str, Any]) -> Sequence[str]:
        """Set hyperparameters and attributes."""
        _cell.load_module(module, entries)
        return ()

    def encode_value(self, value: Any) -> tuple[str, Any] | None:
        """Return a dtype's name."""
        try:
            name = dtype_name(value)
        except TypeError:  # not hashable
            return None
        return None if name is None else ("dtype", name)

    def decode_value(self, kind: str, payload: Any) -> Any:
        """Return the dtype."""
        if kind != "dtype":
            raise ValueError(payload)
        return mindspore_dtype(payload)


register(MindSporeAdapter())
