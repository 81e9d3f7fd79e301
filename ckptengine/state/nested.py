"""Small steps on nested dicts and lists."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from ckptengine.schema.path import Key, Path
from ckptengine.state.per_rank import PerRank

__all__ = ["item_of", "per_rank_items", "replace_contents", "sorted_like", "take_out"]


def item_of(like: Any, key: Any) -> Any:
    """Return what a dict or sequence has under a key, None where it has nothing."""
    if isinstance(like, Mapping):
        if key in like:
            return like[key]
        return next((item for own, item in like.items() if type(own) not in (str, int) and repr(own) == key), None)
    if isinstance(like, (list, tuple, deque)) and type(key) is int and 0 <= key < len(like):
        return like[key]
    return None


def replace_contents(value: Any, new: Any) -> None:
    """Make a dict or list equal to another one, in place."""
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(new)
    else:
        value.update(new)


def per_rank_items(value: Any, path: Path) -> Iterable[tuple[Path, PerRank]]:
    """Yield every PerRank in nested dicts, with its path."""
    if isinstance(value, PerRank):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from per_rank_items(item, (*path, key if type(key) in (str, int) else repr(key)))


def take_out(root: Any) -> None:
    """Put what each PerRank holds in its place, in nested dicts."""
    for key, item in root.items():
        if isinstance(item, PerRank):
            root[key] = item.value
        elif isinstance(item, Mapping):
            take_out(item)


def sorted_like(keys: Iterable[Key], like: Any) -> list[Key]:
    """Return keys in the order that a dict has them, those that it hasn't at the end."""
    order = {key: number for number, key in enumerate(like)} if isinstance(like, Mapping) else {}
    return sorted(keys, key=lambda key: order.get(key, len(order)))
