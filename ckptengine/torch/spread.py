"""Optimizers of which each rank has a part: parameters in flat buffers (FSDP1), and whole parameters' state on single
ranks (ZeroRedundancyOptimizer). To the engine both look like a plain optimizer over whole parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.schema.path import Path, dotted
from ckptengine.torch.deepspeed import flats_by_group, is_zero_optimizer, refresh_weights
from ckptengine.torch.flat import FlatPart, is_flat
from ckptengine.torch.fsdp1 import is_flattened
from ckptengine.torch.inner import optimizers_within
from ckptengine.torch.parts import parts_of

__all__ = [
    "bare_optimizer",
    "check_spread",
    "finish_states",
    "groups_of",
    "is_zero",
    "new_part",
    "part_state",
    "set_part_state",
    "states_elsewhere",
]

_views: Any = WeakIdKeyDictionary()
"""By tensor of an optimizer's state: its parts, by the `id` of the parameter's part, with where it lay."""
_building: Any = WeakIdKeyDictionary()
"""By flat parameter: the buffers that a load is filling, by key and dtype, and the states of parts that it has set."""


class _Group(dict[str, Any]):
    """A group of an optimizer with the parts of its flat parameters in their place; what is set reaches the live one.

    The names that the optimizer was given are those of flat parameters, and stay out.
    """

    def __init__(self, live: dict[str, Any], params: list[Any]) -> None:
        super().__init__({key: value for key, value in live.items() if key != "param_names"})
        super().__setitem__("params", params)
        self._live = live

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "param_names":
            super().__setitem__(key, value)
            self._live[key] = value


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is torch's ZeroRedundancyOptimizer."""
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)


def bare_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that has this rank's state and says what it means: of ZeRO's, the one inside."""
    if is_zero_optimizer(optimizer):
        return optimizer.optimizer
    inside = _inside(optimizer) if is_zero(optimizer) else None
    return inside if isinstance(inside, torch.optim.Optimizer) else optimizer


def _inside(optimizer: Any) -> Any:
    return getattr(optimizer, "optim", None)


def check_spread(optimizer: Any, path: Path, saves_itself: bool) -> None:
    """Raise `StateError` where it can't be told which part of the state this rank has.

    `saves_itself` says that the optimizer, or that inside of ZeRO's, has a `state_dict` of its own.
    """
    if is_zero(optimizer):
        _check_zero(optimizer, path, saves_itself)
    if is_zero_optimizer(optimizer):
        _check_deepspeed(optimizer, path, saves_itself)
        return
    # One that says itself what its state is may be a container of others, without groups.
    inside = optimizers_within(optimizer) if saves_itself else [optimizer]
    groups = [group for one in inside for group in getattr(one, "param_groups", ())]
    flattened = [p for group in groups for p in group["params"] if is_flattened(p)]
    if not flattened:
        return
    if saves_itself or is_zero(optimizer):
        raise StateError(
            f"{dotted(path)}: {type(optimizer).__name__} has a `state_dict` of its own, which knows only the flat "
            "parameters of FullyShardedDataParallel (FSDP1); use `fully_shard` (FSDP2), or an optimizer of torch's"
        )
    if any(parts_of(parameter) is None for parameter in flattened):
        raise StateError(
            f"{dotted(path)}: the optimizer of a FullyShardedDataParallel (FSDP1) module, which alone knows what its "
            "flat parameters are made of; put that module into the same state"
        )


def _check_deepspeed(optimizer: Any, path: Path, saves_itself: bool) -> None:
    if saves_itself or any(parts_of(flat) is None for flats in flats_by_group(optimizer) for flat in flats):
        raise StateError(
            f"{dotted(path)}: DeepSpeed's {type(optimizer).__name__}, of which only the engine knows what its flat "
            "buffers are made of; put the engine into the same state, with an optimizer inside that keeps its state by "
            "parameter: `ckptengine.integrations.deepspeed.state(engine)` gives one"
        )


def _check_zero(optimizer: Any, path: Path, saves_itself: bool) -> None:
    if optimizer._overlap_with_ddp:
        raise StateError(
            f"{dotted(path)}: ZeroRedundancyOptimizer(overlap_with_ddp=True) has no state that could be filled before "
            "its third step, and steps at other times than other optimizers; use overlap_with_ddp=False"
        )
    if isinstance(_inside(optimizer), torch.optim.LBFGS):
        raise StateError(
            f"{dotted(path)}: ZeroRedundancyOptimizer around LBFGS, whose state on each rank is of all "
            "parameters of that rank together; another number of ranks could not take it. Use an optimizer that keeps "
            "its state by parameter, or LBFGS without ZeroRedundancyOptimizer"
        )
    if saves_itself:
        raise StateError(
            f"{dotted(path)}: ZeroRedundancyOptimizer around {type(_inside(optimizer)).__name__}, which has a "
            "`state_dict` of its own; each rank has that of some parameters only. Use an optimizer that keeps its "
            "state by parameter, as torch's do, or `fully_shard` (FSDP2)"
        )


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return groups with the parts of their flat parameters in their place; the live groups where there are none."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])  # a container of optimizers may have none
    flats = flats_by_group(optimizer) if is_zero_optimizer(optimizer) else None
    expanded = [_expanded(group.get("params", ()) if flats is None else flats[g]) for g, group in enumerate(groups)]
    if all(one is None for one in expanded):
        return groups
    return [group if params is None else _Group(group, params) for group, params in zip(groups, expanded, strict=True)]


def _expanded(params: Iterable[Any]) -> list[Any] | None:
    parts = [parts_of(parameter) for parameter in params]
    if all(one is None for one in parts):
        return None
    return [item for p, one in zip(params, parts, strict=True) for item in ([p] if one is None else one)]


def states_elsewhere(optimizer: Any, parameters: Iterable[Any]) -> frozenset[int]:
    """Return the `id`s of parameters of which this rank has no state: others have them, or all there is of them."""
    own = None
    if is_zero(optimizer):  # it shares its parameters out anew whenever it is given more
        own = {id(parameter) for group in optimizer.optim.param_groups for parameter in group["params"]}
    return frozenset(
        id(parameter)
        for parameter in parameters
        if (not parameter.held if is_flat(parameter) else own is not None and id(parameter) not in own)
    )


def part_state(optimizer: Any, part: FlatPart) -> dict[str, Any] | None:
    """Return the state of one part of a flat parameter, as parts of its tensors; None where there is none here."""
    state = bare_optimizer(optimizer).state.get(part.owner)
    if state is None or not part.held:
        return None
    return {key: _part_of(value, part, key) for key, value in state.items()}


def _part_of(value: Any, part: FlatPart, key: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    views = _views.setdefault(value, {})
    place = value.data_ptr(), part.data_ptr()
    known = views.get(id(part))
    if known is None or known[0] != place:
        known = views[id(part)] = (place, _cut(value, part, key))
    return known[1]


def _cut(value: torch.Tensor, part: FlatPart, key: str) -> Any:
    owner = part.buffer if part.owner is None or part.pooled else part.owner
    if value.dim() == 0:
        # Of several parts each has it, as its parameter would without FSDP: no tie between them.
        return FlatPart.of(value, (), 0, whole=True, borrowed=True) if part.pooled else value
    if part.whole and not part.pooled and tuple(value.shape) == part.global_shape:
        return value  # NO_SHARD keeps parameters' shapes
    if value.numel() == owner.numel() and value.dim() == 1:
        if not part.pooled:
            return part.like(value, value, borrowed=True)
        offset = part.storage_offset() - part.buffer.storage_offset()
        return part.like(value[offset : offset + part.run.numel()], value, borrowed=True)
    raise StateError(
        f"the optimizer's {key!r} of shape {tuple(value.shape)} belongs to a flat parameter of {owner.numel()} "
        "elements of FullyShardedDataParallel (FSDP1) or DeepSpeed, so it can't be known what it says of each "
        "parameter; use `fully_shard` (FSDP2)"
    )


def new_part(part: FlatPart, key: str, dtype: torch.dtype, shape: tuple[int, ...], on_device: bool) -> torch.Tensor:
    """Return zeros for one item of a part's state, in the buffer in which the other parts of it lie."""
    if shape == () and (key == "step" or part.global_shape != ()):
        return torch.zeros((), dtype=dtype, device=part.device if key != "step" or on_device else "cpu")
    if shape != part.global_shape:
        raise LoadMismatchError(
            f"the optimizer's {key!r} of shape {shape} belongs to a parameter of shape {part.global_shape}, of which "
            "a rank has a run of elements here; load into `fully_shard` (FSDP2)"
        )
    if part.whole and not part.pooled:
        return torch.zeros(shape, dtype=dtype, device=part.device)
    if not part.pooled:
        return part.like(torch.zeros(part.run.numel(), dtype=dtype, device=part.device))
    buffers = _building.setdefault(part.owner, ({}, {}))[0]
    buffer = buffers.get((key, dtype))
    if buffer is None:
        buffer = buffers[key, dtype] = torch.zeros(part.buffer.numel(), dtype=dtype, device=part.device)
    offset = part.storage_offset() - part.buffer.storage_offset()
    return part.like(buffer[offset : offset + part.run.numel()], buffer)


def set_part_state(optimizer: Any, part: FlatPart, state: dict[str, Any] | None) -> None:
    """Set the state of one part; that of a flat parameter is set by `finish_states`, when all of it is there."""
    if part.pooled:
        _building.setdefault(part.owner, ({}, {}))[1][id(part)] = state
    elif state is None:
        optimizer.state.pop(part.owner, None)
    else:
        optimizer.state[part.owner] = {key: value.buffer if is_flat(value) else value for key, value in state.items()}


def finish_states(optimizer: Any, groups: Sequence[dict[str, Any]], path: Path) -> None:
    """Set the states of flat parameters, of those of their parts.

    Raises `LoadMismatchError` naming the parameters where some have state and others none, or other numbers.
    """
    wrapper, optimizer = optimizer, bare_optimizer(optimizer)
    for group in groups:
        parts: dict[int, tuple[Any, list[FlatPart]]] = {}
        for part in group["params"]:
            if is_flat(part) and part.pooled and part.held:
                parts.setdefault(id(part.owner), (part.owner, []))[1].append(part)
        for flat, held in parts.values():
            told = _building.pop(flat, ({}, {}))[1]
            states = [told.get(id(part)) for part in held]
            if all(id(part) not in told for part in held):
                continue
            _set_flat(optimizer, flat, held, states, path)
    if is_zero_optimizer(wrapper):
        refresh_weights(wrapper)
    if is_zero(wrapper):  # its steps make states in the order of its own groups
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        in_order = {parameter: optimizer.state[parameter] for parameter in own if parameter in optimizer.state}
        optimizer.state.clear()
        optimizer.state.update(in_order)


def _set_flat(optimizer: Any, flat: Any, parts: list[FlatPart], states: list[Any], path: Path) -> None:
    if all(state is None for state in states):
        optimizer.state.pop(flat, None)
        return
    keys = [None if state is None else sorted(state) for state in states]
    if any(one != keys[0] for one in keys):
        raise LoadMismatchError(
            f"{dotted(path)}: of the parameters that lie in one flat buffer of FullyShardedDataParallel (FSDP1) "
            "or DeepSpeed, some have state in the checkpoint and others none; with FSDP1, `use_orig_params=True` takes "
            "them"
        )
    result: dict[str, Any] = {}
    for key, first in states[0].items():
        values = [state[key] for state in states]
        if is_flat(first) and first.global_shape == parts[0].global_shape and first.dim() == 1:
            buffer = first.buffer
            for part, value in zip(parts, values, strict=True):
                if value.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
                    offset = part.storage_offset() - part.buffer.storage_offset()
                    buffer[offset : offset + value.run.numel()].copy_(value.run)
            result[key] = buffer
            continue
        bare = [value.run if is_flat(value) else value for value in values]
        if not all(_equal(value, bare[0]) for value in bare):
            raise LoadMismatchError(
                f"{dotted(path)}: the parameters that lie in one flat buffer of FullyShardedDataParallel (FSDP1) "
                f"or DeepSpeed have different {key!r} in the checkpoint; with FSDP1, `use_orig_params=True` takes them"
            )
        result[key] = first.buffer if is_flat(first) else first
    optimizer.state[flat] = result


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(type(one) is type(other) and one == other)
