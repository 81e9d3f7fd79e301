"""The end of a process that was told to end: why, until when, and what is waited for until then."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from ckptengine.errors import Preempted
from ckptengine.policy.preemption import Preemption

__all__ = ["Ending"]

_LAST_WORDS_SECONDS = 1.0

_log = logging.getLogger("ckptengine")


class Ending:
    """What bounds the process once the first word has come that the job ends.

    `timeout`, in seconds, bounds the wait for the training's next call where no grace period does. `stands` returns the
    newest committed step that this rank knows of. `name` is the run's.
    """

    def __init__(
        self, preemption: Preemption, rank: int, name: str, timeout: float, stands: Callable[[], int | None]
    ) -> None:
        self._preemption, self._rank, self._name, self._timeout = preemption, rank, name, timeout
        self._stands = stands
        self._lock = threading.Lock()
        self._end_at: float | None = None
        self._why = "the training did not come to its next step in time"
        self._awaited = "the training's next call of step or save"
        self.reason, self.grace = "", preemption.grace

    def forked(self) -> None:
        """Renew what a thread that is not here may have held, in a forked process."""
        self._lock = threading.Lock()

    @property
    def left(self) -> float | None:
        """Seconds until this process is ended, None where nothing bounds it."""
        return None if self._end_at is None else self._end_at - time.monotonic()

    def bound(self, reason: str, grace: float | None) -> bool:
        """Note why the job ends, and until when; the first word counts. Return whether this was it."""
        with self._lock:
            if self.reason:
                return False
            self.reason, self.grace = reason, grace
            left = self._timeout if grace is None else grace - self._preemption.margin
            self._end_at = time.monotonic() + left
            return True

    def saving(self, step: int) -> None:
        """Note what is being waited for; without a grace period, the save has its own time."""
        self._awaited, self._why = f"step {step} to be durable", f"step {step} was not durable in time"
        if self.grace is None:
            self._end_at = None

    def leaving(self) -> None:
        """Note that the process is on its way out."""
        self._awaited, self._why = "the process to end", "the process did not end by itself"

    def overdue(self, signalled: int | None) -> NoReturn:
        """End the process because its time is over; `signalled` is the signal that it got itself, if it got any."""
        # Without a grace period nobody has asked for more than what the signal does by itself.
        self.end(self._why, None if self.grace is not None or signalled is None else 128 + signalled)

    def tell(self, seconds: float, left: float) -> None:
        """Log what has been waited for since so many seconds."""
        _log.warning(
            "%s: waiting for %s since %.0f s; the process is ended in %.0f s",
            self.reason,
            self._awaited,
            seconds,
            max(0.0, left),
        )

    def preempted(self, step: int | None, problem: str) -> Preempted:
        """Return what is raised where all is done: `step` was saved, or `problem` says why not; logs it on rank 0."""
        code = self._preemption.exit_code
        stands = self._stands()
        if step is not None:
            message = f"{self.reason}: step {step} is saved; exiting with code {code}"
        else:
            message = f"{self.reason}: {problem}; {_standing(stands)}; exiting with code {code}"
        if self._rank == 0:
            _log.warning("%s", message)
        if (thread := threading.current_thread()) is not threading.main_thread():
            _log.warning(
                "%s: Preempted is raised in the thread %s and ends that thread only: catch it there, and let the main "
                "thread end the process with code %d",
                self._name,
                thread.name,
                code,
            )
        return Preempted(message, code, step)

    def end(self, why: str, code: int | None = None) -> NoReturn:
        """End the process here and now, from whatever thread: its main thread may be anywhere."""
        code = self._preemption.exit_code if code is None else code
        # Another thread may hold the lock of the log or of a stream, for ever: the words get a second.
        words = threading.Thread(target=self._last_words, args=(why, code), name="ckptengine-end", daemon=True)
        with contextlib.suppress(RuntimeError):
            words.start()
            words.join(_LAST_WORDS_SECONDS)
        os._exit(code)

    def _last_words(self, why: str, code: int) -> None:
        if self._rank == 0 or "rank 0" in why or code != self._preemption.exit_code:
            stands = _standing(self._stands())
            _log.error("%s: %s; %s; rank %d ends with code %d", self.reason, why, stands, self._rank, code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


def _standing(step: int | None) -> str:
    return "nothing is committed yet" if step is None else f"step {step} is the last one committed"
