"""A path: the keys that lead from the user's dict to one leaf of the state, which is the leaf's identity."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["Key", "Path", "dotted", "is_inside", "path_order"]

Key = str | int
Path = tuple[Key, ...]


def dotted(path: Path) -> str:
    """Return a path as people read it, `model.h.0.weight`; not unique, for messages only."""
    return ".".join(str(key) for key in path)


def is_inside(path: Path, others: Collection[Path]) -> bool:
    """Whether a path is one of others, or lies inside one of them."""
    return bool(others) and any(path[:depth] in others for depth in range(len(path) + 1))


def path_order(path: Path) -> tuple[tuple[bool, int, str], ...]:
    """Return what to sort paths by; string and integer keys don't compare, so integers come last."""
    return tuple((True, key, "") if isinstance(key, int) else (False, 0, key) for key in path)
