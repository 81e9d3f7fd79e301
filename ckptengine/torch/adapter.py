"""torch for the engine: tensors on any device, DTensors, modules, optimizers, dtypes and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ckptengine.frameworks.adapter import Adapter, Layouts, ModuleEntry, TensorKind, TensorView
from ckptengine.frameworks.random_stream import RandomStream
from ckptengine.frameworks.registry import register
from ckptengine.schema.box import Box
from ckptengine.schema.path import Path
from ckptengine.torch import accelerator
from ckptengine.torch import kind as _kind
from ckptengine.torch import meta as _meta
from ckptengine.torch import module as _module
from ckptengine.torch import optimizer as _optimizer
from ckptengine.torch import own_calls as _own_calls
from ckptengine.torch import random as _random
from ckptengine.torch import spread as _spread
from ckptengine.torch import wrapped as _wrapped
from ckptengine.torch.attributes import plain_counters
from ckptengine.torch.deepspeed import is_zero_optimizer
from ckptengine.torch.dtensor import is_dtensor
from ckptengine.torch.emptied import gathered_once
from ckptengine.torch.group import group_ranks
from ckptengine.torch.layouts import TorchLayouts
from ckptengine.torch.loader import make_loader
from ckptengine.torch.own_loading import module_loading
from ckptengine.torch.stateful_loader import is_stateful_loader, loader_mismatch
from ckptengine.torch.tensor import (
    aliases,
    convert_tensor,
    dtype_name,
    fingerprints,
    new_like,
    tensor_of,
    torch_dtype,
    view_tensor,
)

__all__ = ["TorchAdapter"]


class TorchAdapter(Adapter):
    """What `Adapter` asks, answered for torch. Reads only, unless a method says otherwise."""

    name = "torch"
    shortages = (MemoryError, torch.OutOfMemoryError)

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a tensor, a parameter or a DTensor."""
        return isinstance(value, torch.Tensor)

    def view(self, tensor: Any, path: Path, *, target: bool) -> TensorView:
        """Return dtype, global shape and this rank's parts."""
        return view_tensor(tensor, path, target=target)

    def is_spread(self, tensor: Any) -> bool:
        """Whether a tensor is a DTensor, or torch's older sharded tensor."""
        return is_dtensor(tensor) or any(kind.__name__ == "ShardedTensorBase" for kind in type(tensor).__mro__)

    def part_of(self, tensor: Any, box: Box) -> torch.Tensor:
        """Return a view of a box."""
        part: torch.Tensor = tensor.detach()
        for dim, (start, length) in enumerate(zip(box.offset, box.shape, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def group_ranks(self, group: Any) -> Sequence[int] | None:
        """Return the ranks of a process group, or of a mesh of one dimension."""
        return group_ranks(group)

    def fingerprints(self, tensors: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Return addresses, shapes, strides and dtypes of what this rank holds."""
        return fingerprints(tensors)

    def aliases(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return detached tensors over the same memory."""
        return aliases(tensors)

    def versions(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return the counters by which autograd sees changes in place; fused optimizers and `.data` go past them."""
        return [tensor._version for tensor in tensors]

    def empty(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a new CPU tensor."""
        return torch.empty(shape, dtype=torch_dtype(dtype))

    def is_wrapped(self, tensor: Any) -> bool:
        """Whether a tensor, or what a DTensor holds, is made of other tensors."""
        return _wrapped.is_wrapped(tensor)

    def unwrap(self, tensor: Any, path: Path) -> dict[str, Any]:
        """Return the inner tensors of a tensor subclass, and what they make."""
        return _wrapped.unwrap(tensor, path)

    def new_wrapped(
        self, about: Any, arrays: Mapping[str, tuple[str, tuple[int, ...]]], parameter: Any, path: Path
    ) -> Any:
        """Return a new tensor of a subclass that is imported."""
        return _wrapped.new_wrapped(about, arrays, parameter, path)

    def new_like(self, tensor: Any, order: tuple[int, ...] | None) -> torch.Tensor:
        """Return a new tensor on the same device, or distributed in the same way."""
        return new_like(tensor, order)

    def tensor_kind(self, tensor: Any) -> TensorKind:
        """Return class and `requires_grad`."""
        return _kind.tensor_kind(tensor)

    def kind_marks(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return `requires_grad` of each."""
        return [tensor.requires_grad for tensor in tensors]

    def as_kind(self, tensor: Any, kind: TensorKind, path: Path) -> torch.Tensor:
        """Return a tensor's memory as a parameter, as a subclass, or as what takes a gradient."""
        return _kind.as_kind(tensor, kind, path)

    def layouts(self, tensors: Sequence[tuple[Path, Any]]) -> Layouts:
        """Return how parameters and tensors are spread."""
        return TorchLayouts(tensors)

    def convert(self, tensor: Any, buffers: Sequence[np.ndarray[Any, Any]], dtype: str) -> None:
        """Fill a tensor from host buffers of another dtype."""
        convert_tensor(tensor, buffers, dtype)

    def is_module(self, value: Any) -> bool:
        """Whether a value is a module."""
        return isinstance(value, torch.nn.Module)

    def check_module(self, module: Any, path: Path) -> None:
        """Raise `StateError` for modules that hide their parameters."""
        _module.check_module(module, path)

    def module_values(self, module: Any) -> Mapping[str, Any]:
        """Return the module's state by its own keys; under FSDP2 this puts the sharded parameters back."""
        return _module.module_values(module)

    def module_entries(self, module: Any, path: Path, values: Mapping[str, Any]) -> list[ModuleEntry]:
        """Return a module's state by names without wrappers' prefixes."""
        return _module.module_entries(module, path, values)

    def module_tensors(self, module: Any) -> Iterable[Any]:
        """Return parameters and buffers."""
        return (*module.parameters(), *module.buffers())

    def dtype_without_memory(self, tensor: Any) -> str | None:
        """Return the dtype of a tensor on the meta device."""
        return dtype_name(tensor.dtype) if tensor.is_meta else None

    def give_memory(self, tensor: Any, dtype: str, cast: bool) -> Callable[[], bool] | None:
        """Give a parameter or buffer memory on torch's default device, as the same object; return what undoes it."""
        return _meta.give_memory(tensor, dtype, cast)

    def unsaved_without_memory(self, module: Any) -> list[str]:
        """Return the names of buffers on the meta device that are not persistent."""
        return _meta.unsaved_without_memory(module)

    def plain_counters(self, value: Any) -> Iterable[tuple[str, Any, dict[str, int]]]:
        """Return the public int attributes that no `state_dict` holds, where it is torch's own."""
        return plain_counters(value)

    def module_loading(self, module: Any) -> frozenset[str] | None:
        """Return which submodules may take tensors of other shapes; None where only torch's own code would load."""
        return module_loading(module)

    def load_module(self, module: Any, entries: Mapping[str, Any]) -> Sequence[str]:
        """Call `load_state_dict`, and return the keys that were not taken."""
        return _module.load_module(module, entries)

    def is_optimizer(self, value: Any) -> bool:
        """Whether a value is an optimizer."""
        return isinstance(value, torch.optim.Optimizer) or is_zero_optimizer(value)

    def bare_name(self, name: str) -> str:
        """Return a parameter's name without the prefixes of DDP, `torch.compile`, FSDP and activation checkpointing."""
        return _module.bare_name(name)

    def optimizer_groups(self, optimizer: Any) -> list[dict[str, Any]]:
        """Return the live groups."""
        return _spread.groups_of(optimizer)

    def bare_optimizer(self, optimizer: Any) -> Any:
        """Return the optimizer inside of ZeroRedundancyOptimizer."""
        return _spread.bare_optimizer(optimizer)

    def has_one_state(self, optimizer: Any) -> bool:
        """Whether an optimizer is LBFGS."""
        return isinstance(optimizer, torch.optim.LBFGS)

    def states_elsewhere(self, optimizer: Any, parameters: Iterable[Any]) -> frozenset[int]:
        """Return the parameters of which other ranks have the state, or the parts."""
        return _spread.states_elsewhere(optimizer, parameters)

    def finish_states(self, optimizer: Any, groups: Sequence[dict[str, Any]], path: Path) -> None:
        """Set the states of flat parameters, of those of their parts."""
        _spread.finish_states(optimizer, groups, path)

    def optimizer_state(self, optimizer: Any, parameter: Any) -> dict[str, Any] | None:
        """Return one parameter's live state; creates none."""
        return _optimizer.optimizer_state(optimizer, parameter)

    def optimizer_states(self, optimizer: Any, parameters: Sequence[Any]) -> list[dict[str, Any] | None] | None:
        """Return the live states of parameters; None where there is state for anything else."""
        return _optimizer.optimizer_states(optimizer, parameters)

    def check_optimizer(self, optimizer: Any, path: Path) -> None:
        """Raise `StateError` for optimizers that can't be saved."""
        _optimizer.check_optimizer(optimizer, path)

    def check_parameter_state(self, parameter: Any, state: Mapping[Any, Any], path: Path) -> None:
        """Raise `StateError` for plain tensors in the state of a sharded parameter."""
        _optimizer.check_parameter_state(parameter, state, path)

    def saves_itself(self, optimizer: Any) -> bool:
        """Whether the class or a hook has changed `state_dict`."""
        return _own_calls.saves_itself(optimizer)

    def loads_itself(self, optimizer: Any) -> bool:
        """Whether the class or a hook has changed `load_state_dict`, or `state_dict`."""
        return _own_calls.loads_itself(optimizer)

    def hand_over(self, optimizer: Any, state: Any | None) -> None:
        """Call the optimizer's `load_state_dict`; lists and state that were shared with others stay so."""
        _own_calls.hand_over(optimizer, state)

    def set_optimizer_state(self, optimizer: Any, parameter: Any, state: dict[str, Any] | None) -> None:
        """Replace or remove one parameter's state."""
        _optimizer.set_optimizer_state(optimizer, parameter, state)

    def pin_host_memory(self, address: int, nbytes: int) -> Callable[[], None] | None:
        """Pin host memory where the accelerator can, and return what undoes it."""
        return accelerator.pin_host_memory(address, nbytes)

    def at_rest(self) -> AbstractContextManager[Any]:
        """Return a context in which the parameters that FSDP2 has gathered stay the same ones."""
        return gathered_once()

    def same_device(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return what makes the accelerator's current device the same in another thread: there it is the first one."""
        return accelerator.same_device()

    def before_optimizer_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """Register torch's global hook, which runs before the step of every optimizer, fused and compiled ones too."""
        return _optimizer.before_optimizer_step(call)

    def set_hyperparameter(self, group: dict[str, Any], key: str, value: Any, cast: bool) -> None:
        """Set one value of a group."""
        _optimizer.set_hyperparameter(group, key, value, cast)

    def new_state_tensor(
        self,
        group: dict[str, Any],
        parameter: Any,
        key: str,
        dtype: str,
        shape: tuple[int, ...],
        spread: str | None = None,
    ) -> torch.Tensor:
        """Return zeros, placed as the optimizer itself would place them, or as the saved ones were."""
        return _optimizer.new_state_tensor(group, parameter, key, dtype, shape, spread)

    def state_spread(self, parameter: Any, key: str, tensor: Any) -> str | None:
        """Return whether an item of state is `plain`, `replicated` or spread like the `parameter`, where unusual."""
        return _optimizer.state_spread(parameter, key, tensor)

    def tensor_of(self, array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
        """Return a CPU tensor over an array's memory."""
        return tensor_of(array, dtype)

    def make_loader(
        self, dataset: Any, plan: Iterable[Any], options: dict[str, Any]
    ) -> torch.utils.data.DataLoader[Any]:
        """Return a DataLoader over a plan."""
        return make_loader(dataset, plan, options)

    def is_stateful_loader(self, value: Any) -> bool:
        """Whether a value is torchdata's StatefulDataLoader."""
        return is_stateful_loader(value)

    def loader_mismatch(
        self, loader: Any, saved: Mapping[Path, Any], saved_world_size: int, world_size: int
    ) -> str | None:
        """Return why a StatefulDataLoader can't go on from a state."""
        return loader_mismatch(loader, saved, saved_world_size, world_size)

    def random_streams(self) -> dict[str, RandomStream]:
        """Return the streams of the CPU and of the devices in use: `torch.cpu`, `torch.cuda`, `torch.cuda:3`."""
        return {f"torch.{name}": stream for name, stream in _random.process_streams().items()}

    def unused_random_stream(self, name: str) -> RandomStream | None:
        """Return the stream of a device that the process does not use yet."""
        framework, _, device = name.partition(".")
        return _random.unused_stream(device) if framework == "torch" else None

    def random_stream_of(self, generator: Any) -> RandomStream | None:
        """Return the stream of a `torch.Generator`."""
        return _random.GeneratorStream(generator) if isinstance(generator, torch.Generator) else None

    def encode_value(self, value: Any) -> tuple[str, Any] | None:
        """Return a dtype's name, a size's lengths or a device's text."""
        if isinstance(value, torch.dtype):
            return "dtype", dtype_name(value)
        if isinstance(value, torch.Size):
            return "size", list(value)
        if isinstance(value, torch.device):
            return "device", str(value)
        return None

    def decode_value(self, kind: str, payload: Any) -> Any:
        """Return the dtype, size or device."""
        if kind == "size":
            return torch.Size(payload)
        if kind == "device":
            try:
                return torch.device(payload)
            except RuntimeError as error:
                raise ValueError(payload) from error
        dtype = getattr(torch, payload)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(payload)
        return dtype


register(TorchAdapter())
