"""The moment at which a job that was told to end has agreed on the step that it saves: rank 0's log says so."""

from __future__ import annotations

import logging
import threading

__all__ = ["Agreed"]


class Agreed(logging.Handler):
    """Made before a signal is sent, waits until it was heard: a thread reads it, which may come many steps later."""

    def __init__(self) -> None:
        super().__init__()
        self._said = threading.Event()
        logging.getLogger("ckptengine").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Look whether this is the message."""
        if "all ranks save the same step" in record.getMessage():
            self._said.set()

    def wait(self) -> None:
        """Wait for it, on rank 0, without the interpreter's lock."""
        assert self._said.wait(60), "the job has not agreed on a step"
        logging.getLogger("ckptengine").removeHandler(self)
