"""Storage calls that end: one that a stalled file system does not answer becomes an error that names it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ckptengine.errors import DeadlineError
from ckptengine.storage.stuck import operation_of

__all__ = ["within"]

_LOOK_SECONDS = 1.0

_T = TypeVar("_T")


def within(
    timeout: float,
    doing: str,
    call: Callable[[], _T],
    moved: Callable[[], object] | None = None,
    left_behind: Callable[[threading.Thread], None] | None = None,
) -> _T:
    """Return what a call returns, or raise what it raises; raises `DeadlineError` where it takes too long.

    The call runs in a thread of its own, which nobody can end: what it does after `timeout` seconds must do no harm, or
    `left_behind` is given, which gets the thread. Where no thread can be had the call is made here, without a bound.
    With `moved` the time counts from the last moment at which that returned something new. `doing` says what the call
    is for; the error adds the file and the operation.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="ckptengine-within", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system, or an interpreter that is ending, refuses more
        return call()
    try:
        ended = _wait(thread, timeout, moved)
    except BaseException:  # Ctrl-C: as a call in this thread would, it ends first; a second one does not wait
        _wait(thread, timeout, moved)
        if thread.is_alive() and left_behind is not None:
            left_behind(thread)
        raise
    if not ended:
        if left_behind is not None:
            left_behind(thread)
        what = operation_of(thread) or "it"
        raise DeadlineError(f"{doing}: {what} has not ended after {timeout:g} s; the storage does not answer")
    if errors:
        raise errors[0]
    return results[0]


def _wait(thread: threading.Thread, timeout: float, moved: Callable[[], object] | None) -> bool:
    """Wait for a thread that gets on; return whether it has ended."""
    last, since = None if moved is None else moved(), time.monotonic()
    while (left := since + timeout - time.monotonic()) > 0:
        thread.join(left if moved is None else min(left, _LOOK_SECONDS))
        if not thread.is_alive():
            return True
        if moved is not None and (now := moved()) != last:
            last, since = now, time.monotonic()
    return not thread.is_alive()
