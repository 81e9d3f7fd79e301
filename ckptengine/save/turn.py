"""One caller at a time: other threads wait for their turn, and a thread never waits for itself."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from ckptengine.errors import CheckpointError, DeadlineError

__all__ = ["Turns"]


class Turns:
    """Gives out turns, of which one thread has one at a time. `what` is what is done in a turn, for messages."""

    def __init__(self, what: str) -> None:
        self._what = what
        # Who holds it is known to the lock itself: an interrupt between two instructions can't make the two differ.
        self._lock: Any = threading.RLock()

    def take(self, timeout: float) -> Turn:
        """Return a turn, to be entered as a context manager, which waits for it `timeout` seconds at most."""
        return Turn(self._lock, self._what, timeout)


class Turn:
    """One thread's turn.

    A signal handler runs in the thread that it has interrupted: a call that it makes into what that thread is inside
    of could only wait for itself. It raises `CheckpointError` instead; a turn that does not come, `DeadlineError`.
    """

    def __init__(self, lock: Any, what: str, timeout: float) -> None:
        self._lock, self._what, self._timeout = lock, what, timeout

    def __enter__(self) -> Turn:
        if self._lock._is_owned():
            raise CheckpointError(
                f"{self._what} was called while this thread is inside of it already, as by a signal handler that has "
                "interrupted it: this call does nothing. Set a flag in the handler and save at the next step; for "
                "signals that end the job, `preemption=` does that"
            )
        try:
            came = self._lock.acquire(timeout=self._timeout)
        except BaseException:
            self._let_go()
            raise
        if not came:
            raise DeadlineError(f"{self._what}: another thread has been inside of it for {self._timeout:g} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._lock._is_owned():
            self._lock.release()
