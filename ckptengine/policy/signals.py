"""Handlers of signals that do nothing but tell a thread, and give the signals back afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType

__all__ = ["Signals"]

_log = logging.getLogger("ckptengine")


class Signals:
    """Writes a byte, the signal's number, to a pipe for each of some signals that comes.

    The byte is written by the interpreter's C handler (`signal.set_wakeup_fd`) where that is free, so it comes also
    while the main thread is inside C code; otherwise by the Python handler. Neither takes a lock. A handler that was
    there before is called as well. A signal that is ignored, or handled by C code, is left alone, and all are where
    this isn't the main thread, which alone may handle signals.
    """

    def __init__(self, wanted: Sequence[signal.Signals], pipe: int) -> None:
        self._pipe = pipe
        self._before: dict[int, signal.Handlers | signal._HANDLER] = {}
        self._closed = False
        self._wakes = False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in wanted:
            before = signal.getsignal(number)
            if before is signal.SIG_IGN or before is None:
                who = "is ignored in this process" if before is signal.SIG_IGN else "has a handler in C code"
                _log.warning("%s %s and is left so: it won't end the job with a checkpoint", number.name, who)
                continue
            self._before[number] = before
            signal.signal(number, self._handle)
        if self._before:
            other = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
            if other == -1:
                self._wakes = True
            else:
                signal.set_wakeup_fd(other)

    def __contains__(self, number: int) -> bool:
        return number in self._before

    def is_shared(self, number: int) -> bool:
        """Return whether somebody else's handler is called for a signal too."""
        return callable(self._before.get(number)) and not isinstance(self._before[number], signal.Handlers)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Run in the main thread, between any two of its instructions: no lock, no log, no wait."""
        before = self._before.get(number, signal.SIG_DFL)
        if not self._closed and not self._woken():
            with contextlib.suppress(OSError):
                os.write(self._pipe, bytes([number]))
        if callable(before) and not isinstance(before, signal.Handlers):
            before(number, frame)
        elif self._closed:
            # Somebody who came later has called us, or could not give the signal back in another thread.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _woken(self) -> bool:
        """Return whether C code has written the byte already. Others (asyncio) may have taken that over since."""
        if not self._wakes:
            return False
        current = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        return current == self._pipe

    def restore(self) -> None:
        """Give the signals back, but not those that somebody else has taken meanwhile."""
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, _living(number, before))
        self._unhook()

    def ignore(self) -> None:
        """Ignore the signals from now on: for the very end of the process, where no handler runs any more."""
        for number in self._before:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_IGN)
        self._unhook()

    def forked(self) -> None:
        """Let go in a forked process: what it gets is not the rank's.

        A launcher that sends such a signal to every process of the job (SLURM does) would end a loader's worker, and
        with it the training before the checkpoint. So the child ignores those that have no meaning of their own;
        SIGTERM, by which parents end their children, is given back.
        """
        self._closed = True
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                spare = number != signal.SIGTERM and before is signal.SIG_DFL
                signal.signal(number, signal.SIG_IGN if spare else before)
        self._unhook()

    def _unhook(self) -> None:
        if self._wakes:
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, self._pipe):
                signal.set_wakeup_fd(current)
            self._wakes = False


def _living(number: int, handler: signal.Handlers | signal._HANDLER) -> signal.Handlers | signal._HANDLER:
    """Return a handler, or what it has replaced where it is one of ours that has let go since."""
    while isinstance(owner := getattr(handler, "__self__", None), Signals) and owner._closed:
        handler = owner._before[number]
    return handler
