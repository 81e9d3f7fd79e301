"""Something small that is done while something large is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Aside"]

_T = TypeVar("_T")


class Aside(Generic[_T]):
    """Runs a call in a thread of its own, or at once where no thread can be had."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call = call
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ckptengine-aside", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system, or an interpreter that is ending, refuses more
            self._run()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._error = error

    def settle(self, timeout: float | None = None) -> bool:
        """Wait until the call has ended, well or not; return whether it had in `timeout` seconds (None: no bound)."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def result(self) -> _T:
        """Wait for the call; return what it returned, or raise what it raised."""
        self.settle()
        if self._error is not None:
            raise self._error
        return self._results[0]
