"""A rehearsal of threads: they run one at a time, in an order that a seed draws, and time passes only in it.

What a module takes from `threading` and `time` is replaced by a rehearsal's (`Rehearsal.threads`, `.clock`); where two
threads may meet, another may come first. A thread that holds its rank's lock of the interpreter keeps all others of its
rank from running. So a seed tells all that happens, and a wait for an hour takes no time.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable

__all__ = ["Gone", "Rehearsal", "Stuck"]

_SLOW = 0.03
"""How often time passes though a thread could run, as on a machine that is busy."""
_SLOW_SECONDS = 0.5
"""How much of it at most."""


class Gone(BaseException):
    """Ends a thread whose process has ended."""


class Stuck(AssertionError):
    """Nothing can run any more, or time is up."""


class _Task:
    def __init__(self, rank: int, work: Callable[[], object]) -> None:
        self.rank, self.work = rank, work
        self.resume, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.awaits: Callable[[], bool] | None = None
        self.until: float | None = 0.0
        self.done = self.gone = False
        self.error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.resume.acquire()
        try:
            if not self.gone:
                self.work()
        except Gone:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.paused.release()


class Rehearsal:
    """The threads of some ranks; `run` returns when all have ended that were begun by `start`."""

    def __init__(self, seed: int) -> None:
        self.random, self.now = random.Random(seed), 0.0
        self._tasks: list[_Task] = []
        self._mains: list[_Task] = []
        self._current: _Task | None = None
        self._holders: dict[int, _Task] = {}
        self.threads = types.SimpleNamespace(
            Condition=lambda lock=None: _Condition(self), Lock=lambda: _Condition(self),
            RLock=lambda: _Condition(self), Event=lambda: _Event(self),
            Thread=lambda target, args=(), name="", daemon=True: _Thread(self, lambda: target(*args)),
            current_thread=lambda: None, main_thread=lambda: None,
        )  # fmt: skip
        self.clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)

    def start(self, rank: int, work: Callable[[], object]) -> None:
        """Begin a rank's main thread."""
        self._mains.append(self.spawn(rank, work))

    def spawn(self, rank: int, work: Callable[[], object]) -> _Task:
        """Begin another thread of a rank."""
        task = _Task(rank, work)
        self._tasks.append(task)
        return task

    @property
    def rank(self) -> int:
        """The rank whose thread runs."""
        return self._running.rank

    @property
    def _running(self) -> _Task:
        assert self._current is not None
        return self._current

    def run(self, seconds: float) -> None:
        """Run until all main threads have ended or are gone; raises `Stuck`, and what a thread raises."""
        try:
            while not all(task.done or task.gone for task in self._mains):
                ready = [task for task in self._tasks if self._can_run(task)]
                if not ready or self.random.random() < _SLOW:
                    self._pass_time(bool(ready), seconds)
                else:
                    self._switch_to(self.random.choice(ready))
        finally:
            for task in self._tasks:
                task.gone = True
                while not task.done:
                    self._switch_to(task)

    def end(self, rank: int) -> None:
        """End the process of a rank, whatever its threads do."""
        for task in self._tasks:
            task.gone = task.gone or task.rank == rank
        self._holders.pop(rank, None)

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        self.block(lambda: False, seconds)

    def hold(self, awaited: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait as `block` does, and let no other thread of this rank run meanwhile."""
        self._holders[self.rank] = self._running
        try:
            self.block(awaited, seconds)
        finally:
            self._holders.pop(self.rank, None)

    def block(self, awaited: Callable[[], bool] | None = None, seconds: float | None = None) -> None:
        """Let others run, until something is so (None: at once), for so many seconds at most."""
        task = self._running
        if task.gone:
            raise Gone
        task.awaits, task.until = awaited, None if seconds is None else self.now + seconds
        task.paused.release()
        task.resume.acquire()
        if task.gone:
            raise Gone

    def _can_run(self, task: _Task) -> bool:
        if task.done or task.gone or self._holders.get(task.rank, task) is not task:
            return False
        return task.awaits is None or task.awaits() or (task.until is not None and self.now >= task.until)

    def _pass_time(self, optional: bool, seconds: float) -> None:
        moments = [
            task.until for task in self._tasks
            if not task.done and not task.gone and task.until is not None and task.until > self.now
            and task.awaits is not None and self._holders.get(task.rank, task) is task
        ]  # fmt: skip
        if optional and (not moments or min(moments) > self.now + _SLOW_SECONDS):
            return
        if not moments or min(moments) > seconds:
            raise Stuck(f"at {self.now:.3f} s nobody goes on")
        self.now = min(moments)

    def _switch_to(self, task: _Task) -> None:
        self._current = task
        task.resume.release()
        task.paused.acquire()
        self._current = None
        if task.error is not None:
            error, task.error = task.error, None
            raise error


class _Condition:
    """A lock that its owner may take again, and those who wait for a word."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._owner: _Task | None = None
        self._count = 0
        self._waiting: list[list[bool]] = []

    def __enter__(self) -> _Condition:
        task = self._rehearsal._running
        if self._owner is not task:
            self._rehearsal.block()
            self._take(task)
        self._count += 1
        return self

    def _take(self, task: _Task) -> None:
        while self._owner is not None:
            self._rehearsal.block(lambda: self._owner is None)
        self._owner = task

    def __exit__(self, *error: object) -> None:
        self._count -= 1
        if not self._count:
            self._owner = None

    def notify_all(self) -> None:
        for told in self._waiting:
            told[0] = True
        self._waiting.clear()

    def wait_for(self, come: Callable[[], bool], seconds: float) -> bool:
        task, until = self._rehearsal._running, self._rehearsal.now + seconds
        while not (found := come()) and self._rehearsal.now < until:
            told = [False]
            self._waiting.append(told)
            count, self._count, self._owner = self._count, 0, None
            self._rehearsal.block(lambda told=told: told[0], until - self._rehearsal.now)
            self._take(task)
            self._count = count
        return found


class _Event:
    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal, self._set = rehearsal, False

    def set(self) -> None:
        self._set = True
        self._rehearsal.block()

    def is_set(self) -> bool:
        self._rehearsal.block()
        return self._set

    def wait(self, seconds: float | None = None) -> bool:
        self._rehearsal.block(lambda: self._set, seconds)
        return self._set


class _Thread:
    def __init__(self, rehearsal: Rehearsal, work: Callable[[], object]) -> None:
        self._rehearsal, self._work = rehearsal, work
        self._task: _Task | None = None

    def start(self) -> None:
        self._task = self._rehearsal.spawn(self._rehearsal.rank, self._work)

    def join(self, seconds: float | None = None) -> None:
        task = self._task
        assert task is not None
        self._rehearsal.block(lambda: task.done, seconds)
