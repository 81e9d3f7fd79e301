"""Windows of an image on their way from the copy to the writer, which starts before the copy has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ckptengine.errors import DeadlineError, SaveFailedError

__all__ = ["Feed", "Window"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes `[begin, end)` of an image, complete, at an address."""

    begin: int
    end: int
    address: int


class Feed(Generic[_T]):
    """One thread puts windows in, in their order; another takes them out, and then what is known of the whole.

    Every wait ends at `deadline`, a moment of `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._changed = threading.Condition()
        self._windows: list[Window] = []
        self._taken = 0
        self._whole: tuple[_T] | None = None
        self._error: BaseException | None = None
        self._given_up = False

    def put(self, window: Window) -> None:
        """Hand over a window; its memory stays as it is until `wait_taken` says that it was written."""
        with self._changed:
            self._windows.append(window)
            self._changed.notify_all()

    def finish(self, whole: _T) -> None:
        """Say that this was all, and hand over what is known of the whole. The first word counts, as of `fail`."""
        with self._changed:
            if not self._ended:
                self._whole = (whole,)
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Say why no more will come."""
        with self._changed:
            if not self._ended:
                self._error = error
                self._changed.notify_all()

    def whole(self) -> _T:
        """Wait until all has been put in, whoever takes it.

        Returns what `finish` was given, or raises what `fail` was.
        """
        with self._changed:
            while self._whole is None:
                if self._error is not None:
                    raise self._error
                self._wait(lambda: self._ended, "the snapshot is not complete")
            return self._whole[0]

    def give_up(self) -> None:
        """Say that nobody will take any more."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows; one counts as written when the next is asked for. Raises what `fail` was told."""
        while True:
            with self._changed:
                self._wait(lambda: self._ended or self._taken < len(self._windows), "the snapshot is not complete")
                if self._error is not None:
                    raise self._error
                if self._taken == len(self._windows):
                    return
                window = self._windows[self._taken]
            yield window
            with self._changed:
                self._taken += 1
                self._changed.notify_all()

    def wait_taken(self, count: int) -> None:
        """Wait until so many windows have been written; raises where nobody writes any more."""
        with self._changed:
            self._wait(lambda: self._given_up or self._taken >= count, "the storage has not taken the snapshot")
            if self._taken < count:
                raise SaveFailedError("the storage failed before the snapshot was complete")

    @property
    def _ended(self) -> bool:
        return self._whole is not None or self._error is not None

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        if not self._changed.wait_for(ready, max(0.0, self._deadline - time.monotonic())):
            raise DeadlineError(f"{what} in time")
