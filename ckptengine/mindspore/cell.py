"""Cells: named parameters and buffers; an optimizer's without the weights that it shares with the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mindspore import Tensor, nn
from mindspore.amp import LossScaler
from mindspore.experimental.optim import Optimizer as GroupOptimizer
from mindspore.train import DynamicLossScaleManager

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import ModuleEntry
from ckptengine.mindspore.scheduler import is_scheduler, load_scheduler, scheduler_items
from ckptengine.schema.path import Path, dotted

__all__ = [
    "is_module",
    "is_optimizer",
    "load_module",
    "module_entries",
    "module_values",
    "shared_weights",
    "state_owners",
]

_STATISTICS = frozenset({"moving_mean", "moving_variance", "running_mean", "running_var", "num_batches_tracked"})
_GROUPS = "param_groups"
# Objects that keep their state in attributes of their own.
_ATTRIBUTES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (DynamicLossScaleManager, ("loss_scale", "cur_iter", "last_overflow_iter", "bad_step")),
    (LossScaler, ("scale_value", "counter")),
)


def is_module(value: Any) -> bool:
    """Whether a value is a Cell, an optimizer among them, or one of MindSpore's loss scalers and schedulers."""
    return isinstance(value, (nn.Cell, DynamicLossScaleManager, LossScaler)) or is_scheduler(value)


def is_optimizer(value: Any) -> bool:
    """Whether a value is an optimizer of `nn`, `experimental.optim` or `mint.optim`."""
    return isinstance(value, (nn.Optimizer, GroupOptimizer))


def shared_weights(optimizer: Any) -> list[Any]:
    """Return the weights that an optimizer changes, which are the network's."""
    return [weight if weight.inited_param is None else weight.inited_param for weight in optimizer.parameters]


def module_entries(module: Any, path: Path) -> list[ModuleEntry]:
    """Return a module's state: parameters by their own names (`fc.weight`, `moments.fc.weight`, `global_step`).

    Raises `StateError` where two parameters have one name.
    """
    entries: dict[str, ModuleEntry] = {}
    for name, value, buffer, live in _items(module):
        if name in entries:
            raise StateError(
                f"{dotted(path)}: two parameters are called {name!r}; rename one (`parameter.name = ...`), or let "
                "the cell do so with `update_parameters_name(prefix)`"
            )
        entries[name] = ModuleEntry(name, name, value, buffer, live)
    return list(entries.values())


def module_values(module: Any) -> dict[str, Any]:
    """Return the values of `module_entries` by their names."""
    return {name: value for name, value, _, _ in _items(module)}


def state_owners(optimizer: Any) -> list[tuple[str, Any, Any]]:
    """Return name, tensor and weight of what an optimizer keeps for its weights: `moment1.fc.weight` for `fc.weight`.

    The longest of the weights' names that a name ends with is its weight's; nothing for what is no optimizer.
    """
    weights = {weight.name: weight for weight in shared_weights(optimizer)} if is_optimizer(optimizer) else {}
    found = []
    for name, value, _, _ in _items(optimizer) if weights else ():
        parts = name.split(".")
        owner = next(
            (weights[end] for start in range(1, len(parts)) if (end := ".".join(parts[start:])) in weights), None
        )
        if owner is not None and isinstance(value, Tensor):
            found.append((name, value, owner))
    return found


def load_module(module: Any, entries: Mapping[str, Any]) -> None:
    """Set what could not be filled in place: hyperparameters of groups, attributes of loss scalers and schedulers."""
    if is_scheduler(module):
        load_scheduler(module, entries)
        return
    for name, value in entries.items():
        if name != _GROUPS or not isinstance(module, GroupOptimizer):
            setattr(module, name, value)
            continue
        for group, new in zip(module.param_groups, value, strict=True):
            group.update({k: item for k, item in new.items() if k != "params" and not isinstance(item, Tensor)})


def _items(module: Any) -> Iterator[tuple[str, Any, bool, bool]]:
    """Yield name, value, whether ranks may hold differing copies of it, and whether it is filled in place."""
    for kind, attributes in _ATTRIBUTES:
        if isinstance(module, kind):
            for name in attributes:
                if hasattr(module, name):
                    value = getattr(module, name)
                    yield name, value, False, isinstance(value, Tensor)
            return
    if is_scheduler(module):
        for name, value in scheduler_items(module):
            yield name, value, False, isinstance(value, Tensor)
        return
    weights = {id(weight) for weight in module.parameters} if is_optimizer(module) else frozenset()
    seen = set(weights)
    for prefix, cell in _cells(module):
        for own, parameter in cell._params.items():
            if parameter is not None and parameter.inited_param is not None:
                parameter = parameter.inited_param
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter.name, parameter, own in _STATISTICS, True
        for own, buffer in cell._buffers.items():
            if buffer is not None and own not in cell._non_persistent_buffers_set:
                yield f"{prefix}.{own}".lstrip("."), buffer, True, True
    if isinstance(module, GroupOptimizer):
        yield _GROUPS, [_plain_group(group) for group in module.param_groups], False, False


def _cells(root: nn.Cell) -> Iterator[tuple[str, nn.Cell]]:
    """Yield what `cells_and_names` does, without its nested generators: this is done for every save."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Cell]] = [("", root)]
    while stack:
        prefix, cell = stack.pop()
        if id(cell) in seen:
            continue
        seen.add(id(cell))
        yield prefix, cell
        for name, child in reversed(cell._cells.items()):
            if child is not None:
                stack.append((f"{prefix}.{name}" if prefix else name, child))


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's hyperparameters; of its parameters the names."""
    return {key: [p.name for p in value] if key == "params" else value for key, value in group.items()}
