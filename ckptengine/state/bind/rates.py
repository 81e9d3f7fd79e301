"""Whether what a scheduler keeps by the numbers of groups is that of the groups that it has now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptengine.errors import LoadMismatchError
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.saved import Node, SavedValue

__all__ = ["check_rates", "other_number", "other_order"]

_INSIDE = ("objects", "schedulers", "_schedulers")
"""Where objects have schedulers: `ce.Merged`, containers of trainers, torch's own that are made of others."""

_MADE_OF = "_schedulers"
"""Where torch's own have those that they are made of, each with a state of its own there. Not all of these may act."""

_DEPTH = 4
"""How deep schedulers are looked for in what holds them."""

_LAST = "_last_lr"
_PAIRS = (("base_lrs", "initial_lr"), (_LAST, "lr"))
"""What a scheduler has for each group, and what the group itself has of that."""

_LISTS = ("base_lrs", "lr_lambdas", "min_lrs", _LAST)
"""Lists in a scheduler's state that have one item for each group."""

_MADE_ANEW = ("min_lrs", _LAST)
"""Those that may have an item for each group that the optimizer had later; the scheduler makes them anew."""

Groups = Sequence[Mapping[str, Any]]
"""An optimizer's groups."""


def other_number(target: Any, current: Any, saved: Any) -> str | None:
    """Return why a scheduler's saved state is that of another number of groups than its state here, None if it isn't.

    `saved` is a node. torch takes such a state, and gives groups no rates, or fails at a later step.
    """
    optimizers = [getattr(scheduler, "optimizer", None) for scheduler, _, _ in _schedulers(target)]
    return _other_number(current, saved, {len(groups) for groups in map(_groups_of, optimizers) if groups})


def _other_number(current: Any, saved: Any, groups: set[int], depth: int = 0) -> str | None:
    items = enumerate(current) if isinstance(current, (list, tuple)) else ()
    for key, value in current.items() if isinstance(current, Mapping) else items:
        there = _inside(saved, key)
        if there is None or not isinstance(value, (list, tuple, Mapping)):
            continue
        count = _length(there) if key in _LISTS and isinstance(value, list) else None
        if count not in (None, len(value)) and not _is_made_anew(key, value, saved, count in groups):
            here = next(iter(groups)) if key in _MADE_ANEW and len(groups) == 1 else len(value)
            return (
                f"a scheduler of {count} parameter group{'' if count == 1 else 's'} in the checkpoint, of {here} "
                f"here (its {key}). Make the groups that were saved; if others are meant, load without the scheduler "
                "(`only=`; `strict=False` leaves it as it is) and make it with the `last_epoch` to go on from"
            )
        found = _other_number(value, there, groups, depth + 1) if depth < _DEPTH else None
        if found is not None:
            return found
    return None


def _is_made_anew(key: Any, here: Any, saved: Any, fits: bool) -> bool:
    """Whether a list of another length than `here` `fits` the optimizer, or is made to fit at the next step."""
    if key not in _MADE_ANEW:
        return False
    if fits or not here:
        return True
    return key == "min_lrs" and isinstance(_plain(_inside(saved, "default_min_lr")), (int, float))


def _inside(saved: Any, key: Any) -> Any:
    """Return what a node, or a plain value, has under a key, None where it has nothing."""
    if isinstance(saved, Node):
        if isinstance(saved.entry, SavedValue):
            return _inside(saved.entry.value, key)
        return saved.child(key) if isinstance(key, (str, int)) else None
    if isinstance(saved, Mapping):
        return saved.get(key)
    return saved[key] if isinstance(saved, (list, tuple)) and key in range(len(saved)) else None


def _plain(saved: Any) -> Any:
    """Return a plain value, also that of a node."""
    return saved.entry.value if isinstance(saved, Node) and isinstance(saved.entry, SavedValue) else saved


def _length(saved: Any) -> int | None:
    """Return how many items a saved list has, None for what is no list."""
    saved = _plain(saved)
    if isinstance(saved, Node):
        return len(saved.children) if saved.children and all(isinstance(key, int) for key in saved.children) else None
    return len(saved) if isinstance(saved, list) else None


def other_order(target: Any, saved: Node, moved: Callable[[Any], Groups | None]) -> str | None:
    """Return why a scheduler's saved state has the rates of its groups in another order, None if it hasn't.

    An optimizer's groups follow their parameters to other ranks; a scheduler's lists stay as they were saved. `moved`
    returns the groups that an optimizer is to have. Rates that are none of these groups' were set by the user, and say
    nothing.
    """
    for scheduler, state, inner in _schedulers(target, saved):
        groups = moved(getattr(scheduler, "optimizer", None))
        if groups is not None and (reason := _other_order(scheduler, _items(state), groups, inner)) is not None:
            return reason
    return None


def check_rates(target: Any, path: Path) -> None:
    """Raise `LoadMismatchError` for what `other_order` can't see before the load: rates in tensors, optimizers that are
    not in the state themselves."""
    for scheduler, _, inner in _schedulers(target):
        groups = _groups_of(getattr(scheduler, "optimizer", None))
        reason = _other_order(scheduler, getattr(scheduler, "__dict__", {}), groups, inner) if groups else None
        if reason is not None:
            raise LoadMismatchError(
                f"{dotted(path)}: {reason}. The state has been filled already: load into it again before it is used"
            )


def _other_order(scheduler: Any, state: Mapping[Any, Any], groups: Groups, inner: bool) -> str | None:
    lists = {key: _numbers(value) for key, value in state.items() if isinstance(_plain(value), list)}
    by_group = [one for key, one in lists.items() if key != _LAST and len(one) == len(groups)]
    if all(len(set(one)) <= 1 for one in by_group):  # it computes nothing from them
        return None
    for name, key in _PAIRS:
        rates, there = lists.get(name, []), _numbers([group.get(key) for group in groups])
        if len(rates) != len(there) or rates == there or not set(there) <= set(rates):
            continue
        # These are of its last step, after which others may have set the groups' rates.
        if name == _LAST and (inner or sorted(rates) != sorted(there)):
            continue
        number = next(n for n, (rate, own) in enumerate(zip(rates, there, strict=True)) if rate != own)
        return (
            f"{describe_type(scheduler)} has {name} {rates} in the order that the groups had when it was saved, and "
            f"the groups here, which follow their parameters, have {key!r} {there}: it would give group {number} the "
            "rate of another one. Make the optimizer's groups in the order in which they were saved, on all ranks, or "
            "load without the scheduler (`only`) and make it anew"
        )
    return None


def _groups_of(optimizer: Any) -> Groups | None:
    groups = getattr(optimizer, "param_groups", None)
    return groups if isinstance(groups, list) and all(isinstance(group, dict) for group in groups) else None


def _schedulers(target: Any, saved: Any = None, inner: bool = False, depth: int = 0) -> Iterator[tuple[Any, Any, bool]]:
    """Yield an object and those in it, with the saved state of each, and whether another one is made of it."""
    yield target, saved, inner
    for name in _INSIDE if depth < _DEPTH else ():
        found = getattr(target, name, ())
        for number, one in enumerate(found) if isinstance(found, (list, tuple)) else ():
            state = _inside(_inside(saved, name), number) if name == _MADE_OF else saved
            yield from _schedulers(one, state, inner or name == _MADE_OF, depth + 1)


def _items(saved: Any) -> Mapping[Any, Any]:
    """Return what a node, or a plain value, has by its keys."""
    value = _plain(saved)
    if isinstance(value, Node):
        return value.children
    return value if isinstance(value, Mapping) else {}


def _numbers(values: Any) -> list[float]:
    """Return numbers, also those in tensors; none where something is no number."""
    try:
        return [float(value) for value in _plain(values)]
    except (TypeError, ValueError, RuntimeError):
        return []
