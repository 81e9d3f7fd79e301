"""Storage calls that end: one that a stalled file system does not answer becomes an error that names it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ckptengine.errors import DeadlineError
from ckptengine.storage.stuck import operation_of

__all__ = ["within"]

_T = TypeVar("_T")


def within(timeout: float, doing: str, call: Callable[[], _T]) -> _T:
    """Return what a call returns, or raise what it raises; raises `DeadlineError` where it takes too long.

    The call runs in a thread of its own, which nobody can end: what it does after `timeout` seconds must do no harm.
    `doing` says what it is for; the error adds the file and the operation.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="ckptengine-within", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        what = operation_of(thread)
        took = f"{what} has not ended after {timeout:g} s" if what else f"it has not ended after {timeout:g} s"
        raise DeadlineError(f"{doing}: {took}; the storage does not answer")
    if errors:
        raise errors[0]
    return results[0]
