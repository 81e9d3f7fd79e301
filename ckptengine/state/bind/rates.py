"""Whether what a scheduler keeps by the numbers of groups is that of the groups that it has now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptengine.errors import LoadMismatchError
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.saved import Node, SavedValue

__all__ = ["check_rates", "other_number"]

_INSIDE = ("objects", "schedulers", "_schedulers")
"""Where objects have schedulers: `ce.Merged`, containers of trainers, torch's own that are made of others."""

_DEPTH = 4
"""How deep schedulers are looked for in what holds them."""

_PAIRS = (("base_lrs", "initial_lr"), ("_last_lr", "lr"))
"""What a scheduler has for each group, and what the group itself has of that."""

_LISTS = ("base_lrs", "lr_lambdas", "min_lrs", "_last_lr")
"""Lists in a scheduler's state that have one item for each group."""


def other_number(current: Any, saved: Any, depth: int = 0) -> str | None:
    """Return why a scheduler's saved state is that of another number of groups than its state here, None if it isn't.

    `saved` is a node, or a plain value in one. torch takes such a state, and gives groups no rates, or fails at a later
    step.
    """
    items = enumerate(current) if isinstance(current, (list, tuple)) else ()
    for key, value in current.items() if isinstance(current, Mapping) else items:
        there = _inside(saved, key)
        if there is None or not isinstance(value, (list, tuple, Mapping)):
            continue
        if key in _LISTS and isinstance(value, list) and (count := _length(there)) not in (None, len(value)):
            return (
                f"a scheduler of {count} parameter group{'' if count == 1 else 's'} in the checkpoint, of {len(value)} "
                f"here (its {key}). Make the groups that were saved; if others are meant, load without the scheduler "
                "(`only=`; `strict=False` leaves it as it is) and make it with the `last_epoch` to go on from"
            )
        found = other_number(value, there, depth + 1) if depth < _DEPTH else None
        if found is not None:
            return found
    return None


def _inside(saved: Any, key: Any) -> Any:
    """Return what a node, or a plain value, has under a key, None where it has nothing."""
    if isinstance(saved, Node):
        if isinstance(saved.entry, SavedValue):
            return _inside(saved.entry.value, key)
        return saved.child(key) if isinstance(key, (str, int)) else None
    if isinstance(saved, Mapping):
        return saved.get(key)
    return saved[key] if isinstance(saved, (list, tuple)) and key in range(len(saved)) else None


def _length(saved: Any) -> int | None:
    """Return how many items a saved list has, None for what is no list."""
    if isinstance(saved, Node) and isinstance(saved.entry, SavedValue):
        saved = saved.entry.value
    if isinstance(saved, Node):
        return len(saved.children) if saved.children and all(isinstance(key, int) for key in saved.children) else None
    return len(saved) if isinstance(saved, list) else None


def check_rates(target: Any, path: Path) -> None:
    """Raise `LoadMismatchError` where a scheduler that was just loaded has its groups' rates in another order.

    An optimizer's groups follow their parameters to other ranks; a scheduler's lists stay as they were saved. Rates
    that are none of these groups' were set by the user, and say nothing.
    """
    for scheduler in _schedulers(target):
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            continue
        for list_name, key in _PAIRS if _differ_by_group(scheduler, len(groups)) else ():
            rates = _numbers(getattr(scheduler, list_name, ()))
            there = _numbers([group.get(key) for group in groups])
            if len(rates) != len(there) or rates == there or not set(there) <= set(rates):
                continue
            number = next(n for n, (rate, own) in enumerate(zip(rates, there, strict=True)) if rate != own)
            raise LoadMismatchError(
                f"{dotted(path)}: {describe_type(scheduler)} has {list_name} {rates} in the order that the groups had "
                f"when it was saved, and the groups here, which follow their parameters, have {key!r} {there}: it "
                f"would give group {number} the rate of another one. Make the optimizer's groups in the order in which "
                f"they were saved, on all ranks, or load without the scheduler (`only`) and make it anew"
            )


def _differ_by_group(scheduler: Any, groups: int) -> bool:
    """Whether a scheduler has a list of as many numbers as there are groups, not all equal, from which it computes."""
    lists = [value for key, value in getattr(scheduler, "__dict__", {}).items() if key != "_last_lr"]
    return any(isinstance(one, list) and len(one) == groups and len(set(_numbers(one))) > 1 for one in lists)


def _schedulers(target: Any, depth: int = 0) -> Iterator[Any]:
    yield target
    for name in _INSIDE if depth < _DEPTH else ():
        inner = getattr(target, name, ())
        for one in inner if isinstance(inner, (list, tuple)) else ():
            yield from _schedulers(one, depth + 1)


def _numbers(values: Any) -> list[float]:
    """Return numbers, also those in tensors; none where something is no number."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return []
