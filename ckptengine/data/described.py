"""An order of samples, made anew of what identifies it in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ckptengine.data.lanes import lanes_from
from ckptengine.data.order import Order, Sequential, Shuffled

__all__ = ["order_from"]

_KINDS: dict[str, Callable[..., Order]] = {"sequential": Sequential, "shuffled": Shuffled, "lanes": lanes_from}


def order_from(description: Mapping[str, Any]) -> Order:
    """Return the order that `Order.describe` described.

    Raises `ValueError` where there is no such kind, or what is described is no order of that kind.
    """
    arguments = dict(description)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"order of kind {kind!r}: there are {', '.join(sorted(_KINDS))}")
    try:
        return _KINDS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"an order of kind {kind!r} is not made of {arguments!r}: {error}") from None
