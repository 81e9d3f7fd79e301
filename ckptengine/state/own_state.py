"""What an optimizer's own `state_dict()` holds, with its parameters' names in place of their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["GROUPS", "STATE", "named_state", "numbered", "numbers_of", "parts_of"]

STATE, GROUPS = "state", "param_groups"


def numbers_of(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the numbers that torch's `Optimizer.state_dict` gives to the parameters of groups (torch 2.13)."""
    known: dict[int, int] = {}
    start, result = 0, []
    for group in groups:
        for number, parameter in enumerate(group["params"], start):
            known.setdefault(id(parameter), number)
        start += len(group["params"])
        result.append([known[id(parameter)] for parameter in group["params"]])
    return result


def numbered(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, int]]:
    """Return the parameters of groups with these numbers."""
    pairs = zip(groups, numbers_of(groups), strict=True)
    return [pair for group, numbers in pairs for pair in zip(group["params"], numbers, strict=True)]


def parts_of(own: Any, groups: Sequence[Mapping[str, Any]]) -> tuple[Mapping[Any, Any], list[Any]] | None:
    """Return state and groups of what an optimizer's `state_dict` gave.

    None where it has another form than torch's, or other numbers for its parameters: then nothing is known of it.
    """
    if not isinstance(own, Mapping):
        return None
    state, packed = own.get(STATE), own.get(GROUPS)
    if not isinstance(state, Mapping) or not isinstance(packed, list):
        return None
    if not all(isinstance(group, Mapping) and "params" in group for group in packed):
        return None
    return (state, packed) if [group["params"] for group in packed] == numbers_of(groups) else None


def named_state(own: Any, groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> Any:
    """Return an optimizer's own state with names for numbers; as it is where it has another form than torch's.

    Whatever else the optimizer put into it stays beside `state` and `param_groups`.
    """
    parts = parts_of(own, groups)
    if parts is None:
        return own
    state, packed = parts
    numbers = [number for group in numbers_of(groups) for number in group]
    name_of = dict(zip(numbers, [name for group in names for name in group], strict=True))
    return {
        **own,
        STATE: {name_of.get(number, number): item for number, item in state.items()},
        GROUPS: [{**group, "params": list(names[g])} for g, group in enumerate(packed)],
    }
