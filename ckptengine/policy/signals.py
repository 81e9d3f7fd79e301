"""The signals of this process: one place handles them, for whichever Checkpointer trains."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from ckptengine.lifecycle import after_fork

__all__ = ["Subscription", "ignore", "is_shared", "subscribe"]

_log = logging.getLogger("ckptengine")


class Subscription:
    """One who is told of signals, by a thread; `numbers` are those that reach it.

    Of several who want the same signal, the one that came last is told.
    """

    def __init__(self, hub: _Hub, name: str, tell: Callable[[int], None]) -> None:
        self._hub, self.name, self.tell = hub, name, tell
        self.numbers: frozenset[int] = frozenset()

    def close(self) -> None:
        """Let go, from any thread; what nobody wants any more is given back where this is the main thread."""
        self._hub.remove(self)


def subscribe(wanted: Sequence[signal.Signals], name: str, tell: Callable[[int], None]) -> Subscription:
    """Have a thread call `tell` with the number of each of some signals that comes, for the training of run `name`.

    A handler that was there before is called as well. A signal that is ignored, or handled by C code, is left alone.
    Only the main thread may install handlers: in another, those signals reach it that are handled already. The log
    says which don't, and where somebody else has been told of them so far.
    """
    return _hub.add(wanted, name, tell)


def is_shared(number: int) -> bool:
    """Return whether a handler that was there before us is called for a signal too."""
    return _hub.is_shared(number)


def ignore() -> None:
    """Ignore the signals from now on: for the very end of the process, where no handler runs any more."""
    _hub.ignore()


class _Hook:
    """Our handler of one signal, and the one that was there before it.

    Others may keep it and call it, or install it again, after we have let go: then it does what would happen without.
    """

    def __init__(self, hub: _Hub, number: int, before: signal.Handlers | signal._HANDLER) -> None:
        self._hub, self._number, self.before = hub, number, before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Run in the main thread, between any two of its instructions: no lock, no log, no wait."""
        wanted = self._hub.owner(number) is not None
        if wanted:
            self._hub.notice(number)
        if self.shared:
            assert callable(self.before)
            self.before(number, frame)
        elif not wanted:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def installed(self) -> bool:
        return signal.getsignal(self._number) is self

    @property
    def shared(self) -> bool:
        """Whether a handler that was there before is called too."""
        return callable(self.before) and not isinstance(self.before, signal.Handlers)


class _Hub:
    """Writes a byte, the signal's number, to a pipe for each signal that comes, and has a thread that reads them.

    The byte is written by the interpreter's C handler (`signal.set_wakeup_fd`) where that is free, so it comes also
    while the main thread is inside C code; otherwise by the Python handler. The pipe stays open as long as the process
    lives: whatever writes to it late, or by a number that could not be taken back in another thread, writes to nothing
    else. Subscriptions come and go in any thread, also where the garbage collector ends one in the middle of
    this code: so there is no lock, and each change is a single operation on a dict.
    """

    def __init__(self) -> None:
        self._subscriptions: dict[Subscription, None] = {}
        self._hooks: dict[int, _Hook] = {}
        self._pipe: int | None = None
        self._wakes = False

    def add(self, wanted: Sequence[signal.Signals], name: str, tell: Callable[[int], None]) -> Subscription:
        pipe = self._start()
        subscription = Subscription(self, name, tell)
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in wanted if self._install(number)]
            self._hook_wakeup(pipe)
        else:
            handled = [number for number in wanted if isinstance(signal.getsignal(number), _Hook)]
            if missing := [number.name for number in wanted if number not in handled]:
                _log.warning(
                    "%s is trained in the thread %s: %s can be handled in the main thread only and won't end the job "
                    "with a checkpoint (preemption=None says that this is meant)",
                    name,
                    threading.current_thread().name,
                    ", ".join(missing),
                )
        others = {owner.name for number in handled if (owner := self.owner(number)) is not None}
        if others:
            _log.warning(
                "%s and %s train in one process: when it is told to end, a step of %s is saved and the process ends. "
                "Keep in one state what belongs together, close what is done, or give preemption=None to the others",
                ", ".join(sorted(others)),
                name,
                name,
            )
        subscription.numbers = frozenset(handled)
        self._subscriptions[subscription] = None
        return subscription

    def remove(self, subscription: Subscription) -> None:
        self._subscriptions.pop(subscription, None)
        if threading.current_thread() is not threading.main_thread():
            return  # hooks without a subscription let signals pass
        for number, hook in list(self._hooks.items()):
            if self.owner(number) is None:
                if hook.installed:
                    signal.signal(number, hook.before)
                self._hooks.pop(number, None)
        if not self._hooks:
            self._unhook_wakeup()

    def owner(self, number: int) -> Subscription | None:
        """Return who is to be told of a signal."""
        return next((each for each in reversed(list(self._subscriptions)) if number in each.numbers), None)

    def is_shared(self, number: int) -> bool:
        hook = self._hooks.get(number)
        return hook is not None and hook.shared

    def notice(self, number: int) -> None:
        """Tell the thread of a signal, from a handler, where C code has not."""
        if self._pipe is not None and not self._woken():
            with contextlib.suppress(OSError):
                os.write(self._pipe, bytes([number]))

    def ignore(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, hook in self._hooks.items():
            if hook.installed:
                signal.signal(number, signal.SIG_IGN)
        self._unhook_wakeup()

    def forked(self) -> None:
        """Let go in a forked process: what it gets is not the rank's.

        A launcher that sends such a signal to every process of the job (SLURM does) would end a loader's worker, and
        with it the training before the checkpoint. So the child ignores those that have no meaning of their own;
        SIGTERM, by which parents end their children, is given back.
        """
        for number, hook in self._hooks.items():
            if hook.installed:
                spare = self.owner(number) is not None and number != signal.SIGTERM and not hook.shared
                signal.signal(number, signal.SIG_IGN if spare else hook.before)
        self._unhook_wakeup()
        self._subscriptions, self._hooks = {}, {}
        self._pipe = None  # the parent's, and so is the thread that reads it

    def _start(self) -> int:
        """Make the pipe and its thread, once in the life of a process; return where to write."""
        if self._pipe is not None:
            return self._pipe
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writer, False)  # as `set_wakeup_fd` wants it
        self._pipe = writer
        threading.Thread(target=self._read, args=(reader,), name="ckptengine-signals", daemon=True).start()
        return writer

    def _read(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                owner = self.owner(number)
                if owner is None:
                    continue
                try:
                    owner.tell(number)
                except Exception:  # whatever it is, the next signal must be read
                    _log.exception("%s: what %s asks for failed", owner.name, signal.Signals(number).name)

    def _install(self, number: signal.Signals) -> bool:
        """Handle a signal, unless it is somebody's whom we can't call."""
        before = signal.getsignal(number)
        if isinstance(before, _Hook):
            self._hooks[number] = before
            return True
        who = ""
        if before is signal.SIG_IGN or _in_mask("SigIgn", number):
            who = "is ignored in this process"
        elif before is None or (before is signal.SIG_DFL and _in_mask("SigCgt", number)):
            who = "has a handler in C code"
        if who:
            _log.warning(
                "%s %s and is left alone: it will not make the job save a checkpoint and end", number.name, who
            )
            return False
        hook = self._hooks[number] = _Hook(self, number, before)
        signal.signal(number, hook)
        return True

    def _hook_wakeup(self, pipe: int) -> None:
        if not self._hooks or self._wakes:
            return
        other = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
        if other == -1:
            self._wakes = True
        else:
            signal.set_wakeup_fd(other)

    def _woken(self) -> bool:
        """Return whether C code has written the byte already. Others (asyncio) may have taken that over since."""
        if not self._wakes:
            return False
        current = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        return current == self._pipe

    def _unhook_wakeup(self) -> None:
        if self._wakes:
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, self._pipe):
                signal.set_wakeup_fd(current)
            self._wakes = False


def _in_mask(mask: str, number: int) -> bool:
    """Return whether the kernel has a signal as caught (SigCgt) or ignored (SigIgn); False where it doesn't say.

    Python knows only what was installed through it: proc_pid_status(5) has what holds.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    found = re.search(rf"^{mask}:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


_hub = _Hub()
after_fork(_hub.forked)
