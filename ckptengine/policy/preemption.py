"""What a job does that is told to end: the choices."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from ckptengine.storage.open import local_path

__all__ = ["EXIT_CODE", "Preemption"]

EXIT_CODE = 75
"""EX_TEMPFAIL of BSD's sysexits.h: a temporary failure, try again later."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """Choose what tells a job to end; then all ranks save the same step and exit. For `Checkpointer(preemption=...)`.

    - `signals`: names of signals; one signal to any rank is enough.
    - `file`: a path; the job ends when the file appears or is touched. Rank 0 checks once a second. A file that exists
      at the start is ignored until it is touched.
    - `grace`: seconds from the notice (signal or file) until the processes must have ended. A save that is not durable
      by then is given up, and the last committed checkpoint stands. None: the next `step`, and then its save, each have
      the Checkpointer's `timeout`.
    - `exit_code`: of every rank, from 1 to 255.

    Signals and file count from the Checkpointer's first `step` or `save`; before that, signals act as they would
    without it. Raises `ValueError` for an unknown signal or one that can't be handled, a `grace` that is not positive,
    or another `exit_code`; `StorageError` if `file` is a URL.
    """

    signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    file: str | os.PathLike[str] | None = None
    grace: float | None = None
    exit_code: int = EXIT_CODE

    def __post_init__(self) -> None:
        _ = self.numbers
        if self.file is not None:
            local_path(self.file, "file")
        if self.grace is not None and not self.grace > 0:
            raise ValueError(f"grace={self.grace!r}: give a number of seconds, or None for no bound")
        if type(self.exit_code) is not int or not 1 <= self.exit_code <= 255:
            raise ValueError(f"exit_code={self.exit_code!r}: give a number from 1 to 255; 0 would mean success")

    @property
    def numbers(self) -> tuple[signal.Signals, ...]:
        """The signals themselves."""
        if isinstance(self.signals, str):
            raise ValueError(f'signals={self.signals!r}: give a tuple of names, such as ("{self.signals}",)')
        found = []
        for name in self.signals:
            number = getattr(signal, name, None) if isinstance(name, str) else None
            if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
                raise ValueError(f"signals={self.signals!r}: {name!r} is not a signal that can be handled")
            found.append(number)
        return tuple(found)

    @property
    def margin(self) -> float:
        """How many seconds before the end of the grace period a process is ended: a tenth of it, 2 at most."""
        return 0.0 if self.grace is None else min(2.0, self.grace / 10)
