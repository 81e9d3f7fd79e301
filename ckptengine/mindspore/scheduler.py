"""The schedulers of `mindspore.experimental.optim.lr_scheduler`: they keep their state in attributes, and have no calls
for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from mindspore import Tensor, nn
from mindspore.experimental.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR
from mindspore.ops import Primitive

from ckptengine.errors import StateError
from ckptengine.schema.type_name import describe_type

__all__ = ["is_scheduler", "load_scheduler", "scheduler_items"]

# The optimizer is a part of the state by itself, with its learning rates (`_last_lr` holds these very parameters).
_ELSEWHERE = frozenset({"optimizer", "_last_lr"})


def is_scheduler(value: Any) -> bool:
    """Whether a value is a scheduler of learning rates, or of a class made from one."""
    return isinstance(value, (LRScheduler, SequentialLR, ReduceLROnPlateau))


def scheduler_items(scheduler: Any) -> Iterator[tuple[str, Any]]:
    """Yield a scheduler's attributes by name: tensors and plain values, those in lists and in schedulers that it has by
    dotted names (`base_lrs.0`, `_schedulers.1.last_epoch`).

    Functions and operators are left out; a callable object gives its attributes, as in torch's `LambdaLR.state_dict`.
    """
    for name, value in vars(scheduler).items():
        if name not in _ELSEWHERE:
            yield from _flat(name, value)


def load_scheduler(scheduler: Any, values: Mapping[str, Any]) -> None:
    """Set the plain values among a scheduler's items; tensors are filled in place."""
    for name, value in values.items():
        owner: Any = scheduler
        keys = name.split(".")
        for key in keys[:-1]:
            owner = owner[int(key)] if isinstance(owner, (list, tuple)) else getattr(owner, key)
        if isinstance(owner, list):
            last = int(keys[-1])
            if callable(owner[last]):
                owner[last].__dict__.update(value)
            else:
                owner[last] = value
        elif callable(held := getattr(owner, keys[-1], None)):
            held.__dict__.update(value)
        else:
            setattr(owner, keys[-1], value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if is_scheduler(value):
        for inner, item in scheduler_items(value):
            yield f"{name}.{inner}", item
    elif isinstance(value, (list, tuple)) and any(_is_own(item) for item in value):
        for number, item in enumerate(value):
            yield from _flat(f"{name}.{number}", item)
    elif isinstance(value, nn.Cell) and any(True for _ in value.get_parameters()):
        raise StateError(
            f"the scheduler's attribute {name!r} is a {describe_type(value)} with parameters: put it into the state "
            "under a name of its own, and have `step` take it as an argument"
        )
    elif isinstance(value, Tensor) or not callable(value):
        yield name, value
    elif _keeps_state(value):
        yield name, dict(vars(value))


def _is_own(value: Any) -> bool:
    return isinstance(value, Tensor) or is_scheduler(value) or callable(value)


def _keeps_state(value: Any) -> bool:
    """Whether a callable is an object with attributes, not a function, a method, a class or an operator."""
    plain = isinstance(value, (Primitive, partial, type)) or hasattr(value, "__code__") or hasattr(value, "__func__")
    return not plain and bool(getattr(value, "__dict__", None))
