"""Where states are copied to before they are saved in the background: memory that is kept from save to save."""

from __future__ import annotations

import threading
from concurrent.futures import Future, TimeoutError
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ckptengine.errors import DeadlineError
from ckptengine.lifecycle import after_fork

__all__ = ["Staging", "staging"]


class Staging:
    """Torch's stager, kept: new memory at each save is what makes a copy slow.

    The copy of one save must stay as it is until that is written, so the next save waits for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stager: DefaultStager | None = None
        self._last: Future[Any] | None = None

    def stager(self, timeout: float) -> DefaultStager:
        """Return the stager once the save before has been written; raises `DeadlineError` after `timeout` seconds."""
        with self._lock:
            last = self._last
        if last is not None:
            try:
                last.exception(timeout)
            except TimeoutError:
                raise DeadlineError(
                    f"the asynchronous save before this one was not written within {timeout:g} s: save less often, or "
                    "wait for the future that async_save returned"
                ) from None
        with self._lock:
            if self._stager is None:
                pinned = torch.cuda.is_available()
                self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
            return self._stager

    def used_by(self, save: Future[Any]) -> None:
        """Note whose state lies in the memory."""
        with self._lock:
            self._last = save


staging = Staging()


def _after_fork() -> None:
    staging.__init__()  # type: ignore[misc]


after_fork(_after_fork)
