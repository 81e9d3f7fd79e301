"""What is to end with the process, after all saves have: this module registers first, so it is called last."""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol

__all__ = ["ends_last"]


class Ending(Protocol):
    """Something that has an end."""

    def close(self) -> None:
        """End it."""


_living: weakref.WeakSet[Ending] = weakref.WeakSet()


def ends_last(thing: Ending) -> None:
    """Have `thing.close()` called when the process ends, after everything that saves has come to its end."""
    _living.add(thing)


def _at_exit() -> None:
    for thing in list(_living):
        thing.close()


atexit.register(_at_exit)
