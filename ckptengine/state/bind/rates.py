"""Whether the rates that a scheduler keeps by the numbers of groups are those of the groups that it has now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptengine.errors import LoadMismatchError
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type

__all__ = ["check_rates"]

_INSIDE = ("objects", "schedulers", "_schedulers")
"""Where objects have schedulers: `ce.Merged`, containers of trainers, torch's own that are made of others."""

_PAIRS = (("base_lrs", "initial_lr"), ("_last_lr", "lr"))
"""What a scheduler has for each group, and what the group itself has of that."""


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
    for name in _INSIDE if depth < 4 else ():
        inner = getattr(target, name, ())
        for one in inner if isinstance(inner, (list, tuple)) else ():
            yield from _schedulers(one, depth + 1)


def _numbers(values: Any) -> list[float]:
    """Return numbers, also those in tensors; none where something is no number."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return []
