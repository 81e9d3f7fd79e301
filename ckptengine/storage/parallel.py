"""The same work on many things, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["in_parallel"]

_T = TypeVar("_T")


def in_parallel(call: Callable[[_T], object], things: Iterable[_T], threads: int) -> None:
    """Call `call` for all things on at most `threads` threads, this one among them; after an error begin no more.

    Raises the first error when all calls have ended. The calls must be ones that end by themselves. No executor: those
    take no work any more when the interpreter ends, and a save that is in flight then is still brought to its end.
    """
    rest = iter(things)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        while True:
            with lock:
                if errors:
                    return
                try:
                    thing = next(rest)
                except StopIteration:
                    return
            try:
                call(thing)
            except BaseException as error:
                with lock:
                    errors.append(error)
                return

    others = [threading.Thread(target=work, name="ckptengine-transfer", daemon=True) for _ in range(threads - 1)]
    started = []
    for thread in others:
        try:
            thread.start()
        except RuntimeError:  # the system, or an interpreter that is ending, refuses more
            break
        started.append(thread)
    work()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
