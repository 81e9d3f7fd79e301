"""How types are named, in messages and in checkpoints."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["StandsFor", "class_of", "describe_type", "find_class", "full_name"]


class StandsFor:
    """What is saved as objects of another class would be."""

    __slots__ = ()

    @property
    def first(self) -> Any:
        """One of the objects that it stands for."""
        raise NotImplementedError


def class_of(value: Any) -> type:
    """Return the class by which a value is saved."""
    return type(value.first) if isinstance(value, StandsFor) else type(value)


def full_name(kind: type) -> str:
    """Return a class's module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def find_class(name: str) -> type | None:
    """Return a class by its full name, from the modules that are imported; imports nothing."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:count]))
        if found is None:
            continue
        for part in parts[count:]:
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        if isinstance(found, type):
            return found
    return None


def describe_type(value: Any) -> str:
    """Return a value's type as people write it, `collections.Counter`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
