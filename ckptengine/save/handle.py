"""What `async_save` returns: two moments to wait for, and what the save cost."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from ckptengine.comm.exchange import grace
from ckptengine.errors import DeadlineError
from ckptengine.storage.stuck import operation_of

__all__ = ["Moment", "Phase", "SaveHandle", "SaveStats"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a save on this rank (`read`, `plan`, `copy`, `write` or `commit`), in seconds from the call."""

    name: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class SaveStats:
    """Report what one committed save cost on this rank.

    - `step`: None for a single checkpoint. `path`: its directory or URL.
    - `nbytes`: size of this rank's archive, in bytes.
    - `waited_seconds`: time in the call that was spent waiting for the previous save.
    - `stall_seconds`: time that the call took after that; training was blocked.
    - `written_seconds`: time to write this rank's file.
    - `durable_seconds`: time from the call to the commit.
    - `phases`: what happened when. Phases may overlap: writing starts before the copy is complete.
    """

    step: int | None
    path: str
    nbytes: int
    waited_seconds: float
    stall_seconds: float
    written_seconds: float
    durable_seconds: float
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, slots=True)
class _Reached(Generic[_T]):
    """What comes of a moment that was reached."""

    result: _T


class Moment(Generic[_T]):
    """A point that a save reaches (`staged` or `durable`), or fails to reach."""

    def __init__(self, name: str, timeout: float, patience: float = 0.0) -> None:
        self._name, self._timeout = name, timeout
        self._deadline = time.monotonic() + timeout + patience + grace(timeout)
        self.thread: threading.Thread | None = None
        """The thread that is to reach it."""
        self._reached = threading.Event()
        self._outcome: _Reached[_T] | BaseException | None = None
        self.observed = False
        """Whether somebody has asked for the result."""
        self.failing = ""
        """Why it fails, where that is known before it has ended: the others are told, or room is given back."""

    def done(self) -> bool:
        """Return whether it has been reached or has failed."""
        return self._reached.is_set()

    @property
    def left(self) -> float:
        """Seconds until the save's own time is over."""
        return max(0.0, self._deadline - time.monotonic())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds (None: until the save's own time is over) and return `done()`."""
        return self._reached.wait(self.left if timeout is None else timeout)

    def result(self, timeout: float | None = None) -> _T:
        """Wait, then return the save's `SaveStats` (None for `staged`), or raise what made the save fail.

        Raises `DeadlineError` after `timeout` seconds (None: when the save's own time is over).
        """
        self.wait(timeout)
        outcome = self._outcome
        if outcome is None:
            raise self.overdue(timeout)
        self.observed = True
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome.result

    def overdue(self, timeout: float | None = None) -> DeadlineError:
        """Return the error that says what goes on, where a wait of `timeout` seconds has ended without the moment."""
        within = f"{self._timeout if timeout is None else timeout:g} s"
        if self.failing:
            return DeadlineError(f"{self._name} was not reached within {within}: {self.failing}")
        doing = operation_of(self.thread)
        return DeadlineError(
            f"{self._name} was not reached within {within}: {doing} has not ended"
            if doing
            else f"{self._name} was not reached within {within}; the save is still running"
        )

    def reach(self, result: _T) -> None:
        """Mark it as reached, unless it has failed before."""
        self._end(_Reached(result))

    def fail(self, error: BaseException) -> None:
        """Mark it as failed, unless it was reached before."""
        self._end(error)

    def _end(self, outcome: _Reached[_T] | BaseException) -> None:
        if not self._reached.is_set():
            self._outcome = outcome
            self._reached.set()

    def correct(self, result: _T) -> None:
        """Note that it was reached after all, where this rank had been told, or had to assume, that it failed."""
        self._outcome = _Reached(result)

    @property
    def error(self) -> BaseException | None:
        """What made it fail, None where it was reached or is still to come."""
        return self._outcome if isinstance(self._outcome, BaseException) else None

    def abandon(self, error: BaseException) -> None:
        """Fail it in a forked process, where nothing will reach it and another thread may have held its locks."""
        if not self._reached.is_set():
            self._reached = threading.Event()
            self.fail(error)


class SaveHandle:
    """A save in progress, with the `path` of its checkpoint.

    - `staged.wait()`, `staged.result()`: the snapshot is complete, and training may change its tensors.
    - `durable.result()`: the checkpoint is committed and survives power loss. Returns the `SaveStats`, or raises what
      made the save fail.

    A wait ends `timeout` seconds after the save was called, plus the `patience` with which this rank waits for rank 0's
    outcome: rank 0's error names the missing rank, and must come first.
    """

    def __init__(self, path: str, timeout: float, patience: float = 0.0) -> None:
        self.path = path
        self.staged: Moment[None] = Moment(f"the snapshot for {path}", timeout)
        self.durable: Moment[SaveStats] = Moment(f"the commit of {path}", timeout, patience)

    def work_in(self, thread: threading.Thread) -> None:
        """Note the thread that brings the save to its end: what it is doing is said where that takes too long."""
        self.staged.thread = self.durable.thread = thread

    def __repr__(self) -> str:
        state = "durable" if self.durable.done() else "staged" if self.staged.done() else "started"
        return f"<SaveHandle {self.path} {state}>"
