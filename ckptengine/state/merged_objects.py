"""Several objects that have the same state as one: the schedulers of the chunks of a pipeline that one rank has."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptengine.errors import StateError
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type

__all__ = ["common_state", "hand_to_all"]


def common_state(objects: Sequence[Any]) -> Any:
    """Return what the `state_dict` of each of them gives.

    Raises `StateError` naming what differs.
    """
    first = objects[0].state_dict()
    for number, other in enumerate(objects[1:], 1):
        path = next(_differing(first, other.state_dict(), ()), None)
        if path is not None:
            raise StateError(
                f"of the merged {describe_type(objects[0])} objects, those with the numbers 0 and {number} differ in "
                f"{dotted(path) or 'their states'}; merge those that are alike (schedulers: with equally many groups "
                "in each optimizer, and the same rates), or make one for one optimizer over the parameters of all "
                "chunks, or put each into the state under a name of its own (that of its layers, not of its rank)"
            )
    return first


def hand_to_all(objects: Sequence[Any], state: Any) -> None:
    """Give each of them the state, by its `load_state_dict`."""
    for number, one in enumerate(objects):
        one.load_state_dict(copy.deepcopy(state) if number + 1 < len(objects) else state)


def _differing(one: Any, other: Any, path: Path) -> Iterator[Path]:
    if type(one) is not type(other):
        yield path
    elif isinstance(one, Mapping):
        if list(one) != list(other):
            yield path
        else:
            for key, value in one.items():
                yield from _differing(value, other[key], (*path, key if type(key) is int else str(key)))
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield path
        else:
            for number, (value, there) in enumerate(zip(one, other, strict=True)):
                yield from _differing(value, there, (*path, number))
    elif hasattr(one, "shape"):
        # Not as numpy's arrays: they may lie on a device.
        if one.shape != other.shape or not bool((one == other).all()):
            yield path
    elif not (one == other or (one != one and other != other)):
        yield path
