"""Optimizers: their state by parameter, read without a step and created without one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptengine.errors import StateError
from ckptengine.schema.path import Path, dotted
from ckptengine.torch.accelerator import before_graph_replay
from ckptengine.torch.deepspeed import is_zero_optimizer
from ckptengine.torch.dtensor import coordinate_in, is_dtensor, local_runs, splits_of
from ckptengine.torch.flat import FlatPart, is_flat
from ckptengine.torch.own_calls import saves_itself
from ckptengine.torch.parts import any_parts
from ckptengine.torch.random import is_given
from ckptengine.torch.spread import bare_optimizer, check_spread, new_part, part_state, set_part_state
from ckptengine.torch.tensor import torch_dtype
from ckptengine.torch.wrapped import is_wrapped

__all__ = [
    "before_optimizer_step",
    "check_optimizer",
    "check_parameter_state",
    "new_state_tensor",
    "optimizer_state",
    "optimizer_states",
    "set_hyperparameter",
    "set_optimizer_state",
    "state_spread",
]


def check_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Raise `StateError` where state belongs to no parameter, is left out, or nobody knows which part a rank holds."""
    check_spread(optimizer, path, saves_itself(optimizer))
    deepspeed, optimizer = is_zero_optimizer(optimizer), bare_optimizer(optimizer)
    for name, value in vars(optimizer).items():
        if isinstance(value, torch.Generator) and not is_given(value):
            raise StateError(
                f"{dotted(path)}: {type(optimizer).__name__} draws from its own `{name}`, which its state does not "
                f"have; give it to the random streams in the state: `ce.RNG({{{name!r}: optimizer.{name}}})`"
            )
    if getattr(optimizer, "update_each", 1) != 1 and any(
        isinstance(getattr(parameter, "hess", None), torch.Tensor)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ):
        raise StateError(
            f"{dotted(path)}: {type(optimizer).__name__} keeps `hess` on the parameters from step to step, where no "
            "state has it; use `update_each=1`"
        )
    if saves_itself(optimizer) or deepspeed:
        return  # what it says of itself counts
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameter: Any
    for parameter, state in optimizer.state.items():
        if id(parameter) not in parameters:
            raise StateError(
                f"{dotted(path)}: the optimizer has state for something that is in none of its groups "
                f"({type(parameter).__name__} of shape {tuple(getattr(parameter, 'shape', ()))}); add that parameter "
                "to a group (`add_param_group`), or take its state away (`optimizer.state.pop(parameter)`)"
            )
        check_parameter_state(parameter, state, path)


def check_parameter_state(parameter: Any, state: Mapping[Any, Any], path: Path) -> None:
    """Raise `StateError` for plain tensors in the state of a sharded parameter: are they parts, or copies?"""
    if not (is_dtensor(parameter) and any(not p.is_replicate() for p in parameter.placements)):
        return
    for keys, value in _local_arrays(state, ()):
        raise StateError(
            f"{dotted(path)}: the state {dotted(keys)!r} of a sharded parameter of shape "
            f"{tuple(parameter.shape)} is a plain {type(value).__name__} of shape {tuple(value.shape)}, so it "
            "can't be known whether ranks hold parts or copies of it; use an optimizer that makes it as a DTensor, "
            "as torch's do (`DTensor.from_local(value, p.device_mesh, p.placements)`), or train with "
            "DistributedDataParallel"
        )


def _local_arrays(value: Any, keys: Path) -> Iterator[tuple[Path, Any]]:
    """Yield tensors and arrays of more than one element that say nothing of other ranks' parts, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _local_arrays(item, (*keys, key if type(key) is int else str(key)))
    elif isinstance(value, (list, tuple, deque)):
        for number, item in enumerate(value):
            yield from _local_arrays(item, (*keys, number))
    elif isinstance(value, np.ndarray):
        if value.size > 1:
            yield keys, value
    elif isinstance(value, torch.Tensor) and not is_dtensor(value) and value.numel() > 1:
        yield keys, value


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any] | None:
    """Return a parameter's state, None where it has none; `optimizer.state[p]` would add an empty one."""
    if is_flat(parameter):
        return part_state(optimizer, parameter)  # type: ignore[arg-type]
    state: dict[str, Any] | None = getattr(bare_optimizer(optimizer), "state", {}).get(parameter)
    return state


def optimizer_states(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]
) -> list[dict[str, Any] | None] | None:
    """Return the states of parameters, None for each that has none; None where there is state for anything else."""
    optimizer = bare_optimizer(optimizer)
    if any_parts():
        owners = {id(p): p for p in (p.owner if isinstance(p, FlatPart) else p for p in parameters)}
        if sum(bool(optimizer.state.get(p)) for p in owners.values()) != sum(map(bool, optimizer.state.values())):
            return None
        return [optimizer_state(optimizer, parameter) for parameter in parameters]
    states: list[dict[str, Any] | None] = list(map(optimizer.state.get, parameters))
    return states if sum(map(bool, states)) == sum(map(bool, optimizer.state.values())) else None


def before_optimizer_step(call: Callable[[], None]) -> Callable[[], None]:
    """Have something called before any optimizer steps, and before any graph is replayed; return what undoes it."""

    def hook(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        call()

    handle: Any = register_optimizer_step_pre_hook(torch.compiler.disable(hook))  # type: ignore[no-untyped-call]
    graphs = before_graph_replay(call)

    def remove() -> None:
        handle.remove()
        graphs()

    return remove


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: dict[str, Any] | None
) -> None:
    """Replace the state of one parameter; None removes it."""
    optimizer = bare_optimizer(optimizer)
    if isinstance(parameter, FlatPart):
        set_part_state(optimizer, parameter, state)
    elif state is None:
        optimizer.state.pop(parameter, None)
    else:
        optimizer.state[parameter] = state


def set_hyperparameter(group: dict[str, Any], key: str, value: Any, cast: bool) -> None:
    """Set one value of a group; a tensor (a learning rate under `capturable`) stays the same tensor.

    Without `cast` only where it holds the number exactly: else the number takes its place, as in torch's own load.
    """
    current = group.get(key)
    if not isinstance(current, torch.Tensor) or type(value) not in (int, float):
        group[key] = value
        return
    if not cast and torch.full((), value, dtype=current.dtype).item() != value:
        group[key] = value
        return
    with torch.no_grad():
        current.fill_(value)


def new_state_tensor(
    group: dict[str, Any],
    parameter: torch.Tensor,
    key: str,
    dtype: str,
    shape: tuple[int, ...],
    spread: str | None = None,
) -> torch.Tensor:
    """Return zeros for one item of a parameter's state, placed as torch's optimizers place it.

    The step counter is on the parameter's device only in groups that are `capturable` or `fused`; what has
    the parameter's shape is laid out and distributed like it; anything else is distributed like it along the
    dimensions that have the parameter's length, and replicated along the others. `spread` is what `state_spread`
    said of one that was made otherwise.
    """
    kind = torch_dtype(dtype)
    if isinstance(parameter, FlatPart):
        return new_part(parameter, key, kind, shape, bool(group.get("capturable") or group.get("fused")))
    if spread is not None and is_dtensor(parameter):
        told = _zeros_spread(parameter, kind, shape, spread)
        if told is not None:
            return told
    if shape == () and key == "step":
        on_device = group.get("capturable") or group.get("fused")
        return torch.zeros((), dtype=kind, device=parameter.device if on_device else "cpu")
    if shape == tuple(parameter.shape) and not is_wrapped(parameter):
        return torch.zeros_like(parameter, dtype=kind, requires_grad=False)
    if is_dtensor(parameter) and shape:
        return _distributed_zeros(parameter, kind, shape)
    return torch.zeros(shape, dtype=kind, device=parameter.device)


def state_spread(parameter: torch.Tensor, key: str, tensor: torch.Tensor) -> str | None:
    """Return how an item of a parameter's state is spread, where `new_state_tensor` would make it otherwise; else None.

    `plain` is no DTensor, `replicated` a DTensor of which each rank has the whole, `parameter` one with the parameter's
    placements. None also where the parameter is no DTensor, and where it is none of the three.
    """
    if not is_dtensor(parameter):
        return None
    how = _how(parameter, tensor)
    return None if how is None or how == _usual(parameter, key, tuple(tensor.shape)) else how


def _how(parameter: Any, tensor: Any) -> str | None:
    if not is_dtensor(tensor):
        return "plain"
    if tensor.device_mesh != parameter.device_mesh:
        return None
    return _named(parameter, tensor.placements)


def _named(parameter: Any, placements: Sequence[Any]) -> str | None:
    if all(placement.is_replicate() for placement in placements):
        return "replicated"
    return "parameter" if tuple(placements) == tuple(parameter.placements) else None


def _usual(parameter: Any, key: str, shape: tuple[int, ...]) -> str | None:
    """Return how `new_state_tensor` makes an item that nothing is said of."""
    if shape == () and key == "step":
        return "plain"
    if shape == tuple(parameter.shape) and not is_wrapped(parameter):
        return _named(parameter, parameter.placements)
    return _named(parameter, _usual_placements(parameter, shape)) if shape else "plain"


def _usual_placements(parameter: Any, shape: tuple[int, ...]) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [
        placement
        if placement.is_replicate()
        or (len(shape) == parameter.ndim and shape[placement.dim] == parameter.shape[placement.dim])
        else Replicate()
        for placement in parameter.placements
    ]


def _zeros_spread(parameter: Any, dtype: torch.dtype, shape: tuple[int, ...], spread: str) -> torch.Tensor | None:
    """Return zeros that are spread as `state_spread` said; None where that can't be done here."""
    from torch.distributed import tensor as distributed

    if spread == "plain":
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    mesh = parameter.device_mesh
    placements = [distributed.Replicate()] * mesh.ndim if spread == "replicated" else list(parameter.placements)
    if not all(p.is_replicate() or (type(p) is distributed.Shard and p.dim < len(shape)) for p in placements):
        return None
    return distributed.zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements)


def _distributed_zeros(parameter: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, _usual_placements(parameter, shape)
    local = parameter.to_local()
    coordinate = coordinate_in(mesh)
    splits = splits_of(placements, tuple(mesh.shape), coordinate, len(shape), ())
    local_shape = [
        local.shape[dim] if dim_splits and local_runs(length, dim_splits, local.shape[dim]) is not None else length
        for dim, (length, dim_splits) in enumerate(zip(shape, splits, strict=True))
    ]
    zeros = torch.zeros(local_shape, dtype=dtype, device=local.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
