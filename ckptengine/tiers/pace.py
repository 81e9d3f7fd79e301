"""How fast bytes may go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Pace"]


class Pace:
    """A bound on the bytes per second that several threads move together: a token bucket, safe to share.

    What was not used can be made up for, by at most one second's worth: up to any moment no more has gone than
    `bytes_per_second` times the time, and that. `clock` returns seconds; what `sleep` raises ends the `take` that
    called it, which is how a copy that waits is stopped.
    """

    def __init__(
        self,
        bytes_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second={bytes_per_second}: give a number above 0")
        self.bytes_per_second = bytes_per_second
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._paid = clock()
        """Until when all that was taken is paid for; behind the present by what may be made up for."""

    def take(self, nbytes: int) -> None:
        """Return when `nbytes` more may go; whoever comes first is served first."""
        with self._lock:
            now = self._clock()
            self._paid = max(self._paid, now - 1.0) + nbytes / self.bytes_per_second
            wait = self._paid - now
        if wait > 0:
            self._sleep(wait)
