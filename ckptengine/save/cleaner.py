"""What follows a commit: one thread does it, and a saver that is faster than that waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ckptengine.storage.stuck import operation_of

__all__ = ["Cleaner"]

_MOST_BEHIND = 8
"""So many commits may wait for what follows them; the next save waits for the cleaning first."""

_log = logging.getLogger("ckptengine")


class Cleaner:
    """Runs what follows commits in one thread, one at a time, and always the newest: it covers those before it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: tuple[Callable[[], None], str] | None = None
        self._thread: threading.Thread | None = None
        self._behind = 0
        self._told = False

    def offer(self, call: Callable[[], None], path: str) -> None:
        """Have a call made in the background after the commit of `path`; what it raises is logged."""
        with self._changed:
            self._next = call, path
            self._behind += 1
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="ckptengine-clean", daemon=True)
            thread = self._thread
        try:
            thread.start()
        except RuntimeError:  # the system, or an interpreter that is ending, refuses more
            self._run()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._next is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                (call, path), self._next = self._next, None
                covered = self._behind
            try:
                call()
            except Exception as problem:
                _log.warning("%s: cleaning up after the commit failed: %s", path, problem)
            with self._changed:
                self._behind -= covered
                self._told = self._told and self._behind > 0
                self._changed.notify_all()

    def wait_for_room(self, timeout: float) -> str:
        """Wait until few enough commits wait to be followed up; return what keeps it, "" where there is room."""
        with self._changed:
            if self._behind < _MOST_BEHIND:
                return ""
            if not self._told:
                self._told = True
                _log.warning(
                    "deleting old checkpoints is slower than saving: old checkpoints of %d saves are still "
                    "there, and the next save waits for it (%s)",
                    self._behind,
                    operation_of(self._thread) or "no storage call is under way",
                )
            if self._changed.wait_for(lambda: self._behind < _MOST_BEHIND, timeout):
                return ""
            return operation_of(self._thread) or "the cleaning up after earlier saves"

    def settle(self, timeout: float) -> bool:
        """Wait until nothing is left to do; return whether that came in time."""
        deadline = time.monotonic() + timeout
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, max(0.0, deadline - time.monotonic()))

    @property
    def doing(self) -> str:
        """What the thread does in a storage, "" where it does nothing there."""
        return operation_of(self._thread)
