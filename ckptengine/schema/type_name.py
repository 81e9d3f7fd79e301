"""How messages name the type of a value."""

from __future__ import annotations

from typing import Any

__all__ = ["describe_type"]


def describe_type(value: Any) -> str:
    """Return a value's type as people write it, `collections.Counter`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
