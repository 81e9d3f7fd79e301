"""Watches for the word that the job is to end, and brings all ranks to the same step and out."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import NoReturn

from ckptengine.catalog.receipt import StorageStore
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, Preempted
from ckptengine.policy.agreement import Agreement, Limit, Request, Verdict
from ckptengine.policy.preemption import Preemption
from ckptengine.policy.signals import Signals
from ckptengine.storage.base import Storage

__all__ = ["Watch"]

_REPEATED = 3.0
"""Seconds in which the same signal counts as the same word: a launcher passes on what the process has got itself."""
_LEAVING = 10.0
"""Seconds in which a process that is on its way out takes a signal for the launcher's, which ends all when one ends."""
_LEAVE = 5.0
"""Seconds that the main thread has to come to us where there is nothing to save, before the process is ended."""
_LOOK_SECONDS = 1.0
"""How often rank 0 looks for the file."""
_WORD_SECONDS = 2.0
"""How long threads may take for what they do at once, unless the machine is busy."""
_DEPART_SECONDS = 10.0
"""How long ranks wait at most for each other before they exit: only so that none ends another's store."""
_LAST_WORDS_SECONDS = 1.0
_FOLDER = "preemption-"
"""How the directories are named in which ranks without a store of their own leave their messages."""
_CLOSE, _LOOK_AGAIN = b"\xff", b"\xfe"

_log = logging.getLogger("ckptengine")


class Watch:
    """The preemption of one Checkpointer's life; every rank has one.

    Threads wait for a signal, for the file and for other ranks' word; the training's thread calls `arrive` in every
    `step` of the Checkpointer, and that compares two numbers. The calls are counted, not the steps: the ranks make the
    same calls, whatever numbers the steps have. `stands` returns the newest committed step that this rank knows of.
    """

    def __init__(
        self,
        preemption: Preemption,
        comm: Communicator,
        storage: Storage,
        token: str,
        stands: Callable[[], int | None],
    ) -> None:
        self._preemption, self._comm, self._stands = preemption, comm, stands
        self._rank, self._alone = comm.rank, comm.world_size == 1
        self._changed = threading.Condition()
        self._calls = self._fresh_from = 0
        self._limit: int | None = None
        self._verdict: Verdict | None = None
        self._reason = ""
        self._arrived: dict[int, float] = {}
        self._end_at: float | None = None
        self._end_why = ""
        self._leaving_since: float | None = None
        self._closed = threading.Event()
        self._lost = False  # the store is gone: no agreement is possible any more
        self._process = os.getpid()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._agreement: Agreement | None = None
        self._folder: tuple[Storage, str] | None = None
        self._threads: list[threading.Thread] = []
        if not self._alone:
            store, prefix = comm.store(), f"ckptengine/preemption/{token}"
            if store is None:
                self._folder = storage, f"{_FOLDER}{token}"
                store, prefix = _FolderStore(*self._folder), "ask"
                if self._rank == 0:
                    _sweep(*self._folder)
            self._agreement = Agreement(store, comm.rank, comm.world_size, prefix)
            self._start("agree", self._agree)
        if preemption.file is not None and self._rank == 0:
            self._start("file", self._watch_file, os.fspath(preemption.file))
        self._signals = Signals(preemption.numbers, self._writer)
        self._start("watch", self._run)
        _living.add(self)

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name=f"ckptengine-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    # What the training's thread calls.

    def arrive(self) -> bool:
        """Count a call of `step`; return whether the job is to be saved now, and to end.

        Waits where this rank has come to the limit that it told and the verdict is still out: the others may
        stop here. Raises `Preempted` where there is nothing to save, `DeadlineError` where there is no verdict.
        """
        with self._changed:
            self._calls += 1
            if self._limit is None or self._calls < self._limit:
                return False
            wait = 1.0 if self._agreement is None else self._agreement.seconds + _WORD_SECONDS
            if not self._changed.wait_for(lambda: self._verdict is not None, wait):
                raise DeadlineError(f"rank {self._rank} was told to end and no verdict on the step came in {wait:g} s")
            verdict = self._verdict
            assert verdict is not None
        if verdict.kind == "leave":
            self.check()
        return verdict.kind == "stop" and self._calls >= verdict.call

    def check(self) -> None:
        """Raise `Preempted` where the job is to end and nothing has been trained that isn't saved."""
        if self._verdict is not None and self._verdict.kind == "leave":
            raise self._preempted(None, "no step has been trained since its state was made or restored")

    def restarted(self) -> None:
        """Note that the state was restored: what is trained counts from here."""
        self.check()
        with self._changed:
            self._fresh_from = self._calls

    @property
    def left(self) -> float | None:
        """Seconds until this process is ended, None where nothing bounds it."""
        return None if self._end_at is None else self._end_at - time.monotonic()

    def saving(self, step: int) -> None:
        """Note what is being waited for."""
        self._end_why = f"step {step} was not durable in time"

    def leave(self, step: int | None, problem: str) -> NoReturn:
        """Wait until all ranks are done here, and raise `Preempted`; `step` was saved, or `problem` says why not."""
        self._end_why = "the process did not end by itself"
        with contextlib.suppress(CheckpointError):
            self._depart()
        raise self._preempted(step, problem)

    def _depart(self) -> None:
        if self._agreement is None:
            return
        seconds = _DEPART_SECONDS if self.left is None else max(0.1, min(_DEPART_SECONDS, self.left / 2))
        self._comm.barrier(seconds)
        self._leaving_since = time.monotonic()
        self._agreement.depart(seconds)
        if self._folder is not None and self._rank == 0:
            storage, directory = self._folder
            storage.delete_tree(directory)

    def _preempted(self, step: int | None, problem: str) -> Preempted:
        # Handlers stay until the process has ended: the launcher sends SIGTERM to all as soon as the first has.
        self._leaving_since = time.monotonic()
        atexit.register(self._signals.ignore)
        code = self._preemption.exit_code
        stands = self._stands()
        if step is not None:
            message = f"{self._reason}: step {step} is saved; exiting with code {code}"
        else:
            message = f"{self._reason}: {problem}; {_standing(stands)}; exiting with code {code}"
        if self._rank == 0:
            _log.warning("%s", message)
        return Preempted(message, code, step)

    def close(self, failed: bool = False) -> None:
        """Give the signals back and end the threads, except where the process is on its way out.

        A signal that came too late for the ranks to agree acts now as it would have without us, unless `failed`:
        then an error is on its way.
        """
        if self._closed.is_set():
            return
        if self._leaving_since is not None:
            return
        self._closed.set()
        if os.getpid() != self._process:
            return
        self._signals.restore()
        self._wake(_CLOSE)
        # The store may be gone, with the rank that was its host.
        with contextlib.suppress(CheckpointError):
            if self._agreement is not None:
                self._agreement.close(failed)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_WORD_SECONDS)
        with contextlib.suppress(CheckpointError):
            if self._agreement is not None:
                self._agreement.forget()
        os.close(self._writer)
        _living.discard(self)
        if not failed and threading.current_thread() is threading.main_thread():
            for number in self._arrived:
                if not self._signals.is_shared(number):
                    _log.warning("%s came when the job was done: it acts now", signal.Signals(number).name)
                    os.kill(os.getpid(), number)

    def forked(self) -> None:
        """Let go in a forked process."""
        self._signals.forked()
        # New ones: a thread that is not here may have held the locks of the old.
        self._closed, self._changed = threading.Event(), threading.Condition()
        self._closed.set()
        self._limit = None
        os.close(self._reader)
        os.close(self._writer)
        _living.discard(self)

    # What the threads do.

    def _run(self) -> None:
        """Wait for signals, and for the moment when the process has to be ended."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while True:
            left = self.left
            poll.poll(None if left is None else max(0.0, left) * 1000 + 1)
            try:
                data = os.read(self._reader, 64)
            except BlockingIOError:
                data = b""
            if self._closed.is_set():
                os.close(self._reader)
                return
            for number in data:
                if number in self._signals:
                    self._signalled(number)
            if self.left is not None and self.left <= 0:
                self._end(self._end_why)

    def _signalled(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._leaving_since is not None:
            if now - self._leaving_since > _LEAVING and not self._signals.is_shared(number):
                self._end(f"{name} came again", 128 + number)
            return
        first = self._arrived.setdefault(number, now)
        if first == now:
            self._ask(f"{name} on rank {self._rank}")
        elif now - first > _REPEATED and not self._signals.is_shared(number):
            self._end(f"{name} came again", 128 + number)

    def _ask(self, reason: str) -> None:
        """Have all ranks end: from the watching threads, which must not wait for the store."""
        grace = self._preemption.grace
        self._bound(reason, grace)
        if self._agreement is None:
            with self._changed:
                if self._verdict is None:
                    self._limit = self._calls + 1
                    self._conclude(
                        Verdict("leave") if self._calls == self._fresh_from else Verdict("stop", self._limit)
                    )
        else:
            self._start("ask", self._request, Request(reason, grace))

    def _request(self, request: Request) -> None:
        assert self._agreement is not None
        try:
            if self._lost:
                raise CheckpointError("the job's store is gone")
            self._agreement.request(request)
        except CheckpointError as error:
            self._conclude(Verdict("failed", why=str(error)))

    def _bound(self, reason: str, grace: float | None) -> None:
        """Note why the job ends, and until when."""
        self._reason = self._reason or reason
        if grace is not None and self._end_at is None:
            self._end_why = self._end_why or "the training did not come to its next step in time"
            self._end_at = time.monotonic() + grace - self._preemption.margin
            self._wake(_LOOK_AGAIN)

    def _agree(self) -> None:
        """Wait for the word of any rank, and agree with all others on the step."""
        agreement = self._agreement
        assert agreement is not None
        request = None
        try:
            request = agreement.wait()
            if request is None:
                return
            self._bound(request.reason, request.grace)
            with self._changed:
                self._limit = self._calls + 1
                limit = Limit(self._limit, fresh=self._calls == self._fresh_from)
            agreement.publish(limit)
            verdict = agreement.decide() if self._rank == 0 else agreement.hear()
        except CheckpointError as error:
            self._lost = True
            if request is None and not self._arrived:
                return  # the host of the store has ended, as at the end of a job; whoever trains on will notice
            verdict = Verdict("failed", why=str(error))
        self._conclude(verdict)

    def _conclude(self, verdict: Verdict) -> None:
        with self._changed:
            self._verdict = verdict
            calls = verdict.call - self._calls
            self._changed.notify_all()
        if verdict.kind == "failed":
            self._end(f"the ranks could not agree on a step: {verdict.why}")
        elif verdict.kind == "leave":
            self._end_why = "no step had been trained since its state was made or restored"
            soon = time.monotonic() + _LEAVE
            self._end_at = soon if self._end_at is None else min(self._end_at, soon)
            self._wake(_LOOK_AGAIN)
        elif verdict.kind == "stop" and self._rank == 0:
            which = "the next" if calls == 1 else f"the {calls}th from now on"
            _log.warning("%s: all ranks save the same step, %s of rank 0, and end", self._reason, which)

    def _watch_file(self, path: str) -> None:
        """Rank 0: look for the file once a second; a thread of its own, since a file system may hang."""
        before = _identity(path)
        if before is not None:
            _log.warning("%s is there already: it ends this job when it is touched, or made again", path)
        while not self._closed.wait(_LOOK_SECONDS):
            found = _identity(path)
            if found is not None and found != before:
                self._ask(f"the file {path}")
                return
            before = found

    def _wake(self, byte: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._writer, byte)

    def _end(self, why: str, code: int | None = None) -> NoReturn:
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
            _log.error("%s: %s; %s; rank %d ends with code %d", self._reason, why, stands, self._rank, code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


class _FolderStore(StorageStore):
    """A directory of messages that is made when the first one is written."""

    def __init__(self, storage: Storage, directory: str) -> None:
        super().__init__(storage, directory)
        self._place = storage, directory

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        storage, directory = self._place
        storage.make_directory(directory)
        super().set(key, value)

    def delete(self, key: str) -> None:
        """Leave it: the directory goes as a whole."""


def _sweep(storage: Storage, own: str) -> None:
    """Remove what lives that are over have left."""
    with contextlib.suppress(CheckpointError):
        for name in storage.list():
            if name.startswith(_FOLDER) and name != own:
                storage.delete_tree(name)


def _standing(step: int | None) -> str:
    return "nothing is committed yet" if step is None else f"step {step} is the last one committed"


def _identity(path: str) -> tuple[int, int] | None:
    """Return what changes when a file is made or touched, None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


_living: weakref.WeakSet[Watch] = weakref.WeakSet()


def _after_fork() -> None:
    for watch in list(_living):
        watch.forked()


os.register_at_fork(after_in_child=_after_fork)
