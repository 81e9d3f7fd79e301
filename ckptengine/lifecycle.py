"""What happens when the process forks and when it ends: all of it is registered here."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Living", "after_fork", "at_exit", "at_last"]

_T = TypeVar("_T")

_log = logging.getLogger("ckptengine")


def after_fork(call: Callable[[], object]) -> None:
    """Have something called in each process that is forked from this one."""
    os.register_at_fork(after_in_child=call)


def at_exit(call: Callable[[], object]) -> None:
    """Have something called when the interpreter ends; what came last is called first."""
    atexit.register(call)


_last: list[Callable[[], object]] = []


def at_last(call: Callable[[], object]) -> None:
    """Have something called when the interpreter ends, after all that `at_exit` has, whenever that was registered."""
    _last.append(call)


def _end_last() -> None:
    for call in _last:
        _carefully(call)


def _carefully(call: Callable[[], object]) -> None:
    """Call, and log what it raises: the others are to be told, too."""
    try:
        call()
    except Exception as error:
        _log.warning("at the end of the process, or in a forked one: %s", error, exc_info=True)


at_exit(_end_last)  # the first to be registered here


class Living(Generic[_T]):
    """The living objects of one kind, without keeping them alive: each is told of a fork, and of the process's end.

    `forked` is called with each in a forked process, `ended` when the interpreter ends; with `last` that is after the
    end of all others, for what they need at theirs.
    """

    def __init__(
        self, forked: Callable[[_T], object], ended: Callable[[_T], object] | None = None, last: bool = False
    ) -> None:
        self._objects: weakref.WeakSet[_T] = weakref.WeakSet()
        after_fork(lambda: self._tell(forked))
        if ended is not None:
            (at_last if last else at_exit)(lambda: self._tell(ended))

    def add(self, one: _T) -> None:
        """Tell an object from now on."""
        self._objects.add(one)

    def discard(self, one: _T) -> None:
        """Tell an object no longer."""
        self._objects.discard(one)

    def __iter__(self) -> Iterator[_T]:
        return iter(list(self._objects))

    def _tell(self, call: Callable[[_T], object]) -> None:
        for one in self:
            _carefully(functools.partial(call, one))
