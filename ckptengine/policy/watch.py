"""Watches for the word that the job is to end, and brings all ranks to the same step and out."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from ckptengine.catalog.lease import is_old
from ckptengine.catalog.receipt import StorageStore
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, Preempted
from ckptengine.lifecycle import Living, at_exit
from ckptengine.policy.agreement import Agreement, Limit, Request, Verdict
from ckptengine.policy.preemption import Preemption
from ckptengine.policy.signals import Subscription, ignore, is_shared, subscribe
from ckptengine.storage.base import Storage
from ckptengine.storage.open import local_path

__all__ = ["Watch"]

_REPEATED = 3.0
"""Seconds in which the same signal counts as the same word: a launcher passes on what the process has got itself."""
_LEAVING = 10.0
"""Seconds in which a process that is on its way out takes a signal for the launcher's, which ends all when one ends."""
_TELL_SECONDS = 10.0
"""How often the log says what is waited for."""
_LOOK_SECONDS = 1.0
"""How often rank 0 looks for the file."""
_WORD_SECONDS = 2.0
"""How long threads may take for what they do at once, unless the machine is busy."""
_DEPART_SECONDS = 10.0
"""How long ranks wait at most for each other before they exit: only so that none ends another's store."""
_END_SECONDS = 10.0
"""How long `close` waits for a thread: one that is still in a call of torch's store when the interpreter ends, on the
rank that hosts the store, makes C++ abort the process (exit code -6), and torchrun would start a finished job again."""
_LAST_WORDS_SECONDS = 1.0
_FOLDER = "preemption-"
"""How the directories are named in which ranks without a store of their own leave their messages."""

_log = logging.getLogger("ckptengine")


class Watch:
    """The preemption of one Checkpointer's life; every rank has one.

    Threads wait for a signal, for the file and for other ranks' word; the training's thread calls `arrive` in every
    `step` of the Checkpointer, and that compares two numbers. The calls are counted, not the steps: the ranks make the
    same calls, whatever numbers the steps have. `stands` returns the newest committed step that this rank knows of.
    `name` is the run's. `timeout`, in seconds, bounds the wait for the next call where no grace period does.

    With the first call it begins to act: only who trains has something to save. Until then signals do what they would
    do without it, the file is not obeyed yet, other ranks are answered (the call to come is the first), and the
    process is not ended. So it is again after `pause`.
    """

    def __init__(
        self,
        preemption: Preemption,
        comm: Communicator,
        storage: Storage,
        token: str,
        name: str,
        timeout: float,
        stands: Callable[[], int | None],
    ) -> None:
        self._preemption, self._comm, self._stands = preemption, comm, stands
        self._name, self._timeout = name, timeout
        self._rank, self._alone = comm.rank, comm.world_size == 1
        self._changed = threading.Condition()
        self._calls = 0
        self._limit: int | None = None
        self._verdict: Verdict | None = None
        self._reason, self._grace = "", preemption.grace
        self._arrived: dict[int, float] = {}
        self._end_at: float | None = None
        self._end_why = "the training did not come to its next step in time"
        self._awaited = "the training's next call of step or save"
        self._leaving_since: float | None = None
        self._closed = threading.Event()
        self._lost = False  # the store is gone: no agreement is possible any more
        self._process = os.getpid()
        self._subscription: Subscription | None = None
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
            self._agreement = Agreement(store, comm.rank, comm.world_size, prefix, timeout)
            self._start("agree", self._agree)
        if preemption.file is not None and self._rank == 0:
            self._start("file", self._watch_file, local_path(preemption.file, "file"))
        _living.add(self)

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name=f"ckptengine-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    # What the training's thread calls.

    def arrive(self) -> bool:
        """Count a call of `step`; return whether the job is to be saved now, and to end.

        Waits where this rank has come to the limit that it told and the verdict is still out: the others may
        stop here. Raises `DeadlineError` where there is no verdict.
        """
        with self._changed:
            self._calls += 1
        if self._subscription is None and not self._closed.is_set():
            self._subscription = subscribe(self._preemption.numbers, self._name, self._signalled)
        with self._changed:
            if self._limit is None or self._calls < self._limit:
                return False
            wait = 1.0 if self._agreement is None else self._agreement.seconds + _WORD_SECONDS
            if not self._changed.wait_for(lambda: self._verdict is not None, wait):
                raise DeadlineError(f"rank {self._rank} was told to end and no verdict on the step came in {wait:g} s")
            verdict = self._verdict
            assert verdict is not None
        if verdict.kind == "failed":
            self._end_disagreed(verdict)
        return verdict.kind == "stop" and self._calls >= verdict.call

    @property
    def left(self) -> float | None:
        """Seconds until this process is ended, None where nothing bounds it."""
        return None if self._end_at is None else self._end_at - time.monotonic()

    def saving(self, step: int) -> None:
        """Note what is being waited for; without a grace period, the save has its own time."""
        self._awaited, self._end_why = f"step {step} to be durable", f"step {step} was not durable in time"
        if self._grace is None:
            self._end_at = None

    def leave(self, step: int | None, problem: str) -> NoReturn:
        """Wait until all ranks are done here, and raise `Preempted`; `step` was saved, or `problem` says why not."""
        self._awaited, self._end_why = "the process to end", "the process did not end by itself"
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
        at_exit(ignore)
        code = self._preemption.exit_code
        stands = self._stands()
        if step is not None:
            message = f"{self._reason}: step {step} is saved; exiting with code {code}"
        else:
            message = f"{self._reason}: {problem}; {_standing(stands)}; exiting with code {code}"
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

    def close(self, failed: bool = False) -> None:
        """Give the signals back and end the threads, except where the process is on its way out.

        A signal that came too late for the ranks to agree acts now as it would have without us, unless `failed`:
        then an error is on its way.
        """
        self._close(failed, acting=not failed)

    def _close(self, failed: bool, acting: bool) -> None:
        if self._closed.is_set():
            return
        if self._leaving_since is not None:
            return
        self._closed.set()
        if os.getpid() != self._process:
            return
        unanswered = self._give_back()
        # The store may be gone, with the rank that was its host.
        with contextlib.suppress(CheckpointError):
            if self._agreement is not None:
                self._agreement.close(failed)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_END_SECONDS)
        with contextlib.suppress(CheckpointError):
            if self._agreement is not None:
                self._agreement.forget()
        _living.discard(self)
        if acting:
            _act(unanswered)

    def pause(self) -> None:
        """Give the signals back until the next call of `arrive`; one that came too late acts now, as in `close`."""
        if not self._closed.is_set() and self._leaving_since is None and os.getpid() == self._process:
            _act(self._give_back())

    def _give_back(self) -> list[int]:
        """Let signals act as they would without us; return those that came and that no handler of others was told."""
        shared = {number for number in self._preemption.numbers if is_shared(number)}
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()
        return [number for number in self._arrived if number not in shared]

    def forget(self) -> None:
        """Close for a Checkpointer that is gone and was never closed: it has not said that it is done."""
        self._close(failed=True, acting=True)

    def forked(self) -> None:
        """Let go in a forked process."""
        # New ones: a thread that is not here may have held the locks of the old.
        self._closed, self._changed = threading.Event(), threading.Condition()
        self._closed.set()
        self._limit = None
        _living.discard(self)

    # What the threads do.

    def _signalled(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        shared = is_shared(number)
        if self._leaving_since is not None:
            if now - self._leaving_since > _LEAVING and not shared:
                self._end(f"{name} came again", 128 + number)
            return
        first = self._arrived.setdefault(number, now)
        if first == now:
            self._ask(f"{name} on rank {self._rank}")
        elif now - first > _REPEATED and not shared:
            self._end(f"{name} came again", 128 + number)

    def _ask(self, reason: str) -> None:
        """Have all ranks end: from the watching threads, which must not wait for the store."""
        grace = self._preemption.grace
        self._bound(reason, grace)
        if self._agreement is None:
            with self._changed:
                if self._verdict is not None:
                    return
                self._limit = self._calls + 1
                verdict = Verdict("stop", self._limit)
            self._conclude(verdict)
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
        """Note why the job ends, and until when; the first word counts."""
        with self._changed:
            if self._reason:
                return
            self._reason, self._grace = reason, grace
            left = self._timeout if grace is None else grace - self._preemption.margin
            self._end_at = time.monotonic() + left
        self._start("deadline", self._watch_deadline)

    def _watch_deadline(self) -> None:
        """Say what is waited for, and end the process when its time is over."""
        told = begun = time.monotonic()
        while (left := self.left) is not None:
            now = time.monotonic()
            if left <= 0 and self._subscription is not None:
                # Without a grace period nobody has asked for more than what the signal does by itself.
                own = next(iter(self._arrived), None)
                self._end(self._end_why, None if self._grace is not None or own is None else 128 + own)
            if now - told >= _TELL_SECONDS and (self._rank == 0 or self._arrived):
                told = now
                _log.warning(
                    "%s: waiting for %s since %.0f s; the process is ended in %.0f s",
                    self._reason,
                    self._awaited,
                    now - begun,
                    max(0.0, left),
                )
            if self._closed.wait(min(1.0, left) if left > 0 else 1.0):
                return

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
                limit = Limit(self._limit)
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
        if verdict.kind == "failed" and self._subscription is not None:
            self._end_disagreed(verdict)
        if verdict.kind == "stop" and self._rank == 0:
            which = "the next" if calls == 1 else f"the {calls}th from now on"
            _log.warning("%s: all ranks save the same step, %s of rank 0, and end", self._reason, which)

    def _end_disagreed(self, verdict: Verdict) -> NoReturn:
        self._end(f"the ranks could not agree on a step: {verdict.why}")

    def _watch_file(self, path: str) -> None:
        """Rank 0: look for the file once a second; a thread of its own, since a file system may hang."""
        before = _identity(path)
        if before is not None:
            _log.warning("%s is there already: it ends this job when it is touched, or made again", path)
        while not self._closed.wait(_LOOK_SECONDS):
            found = _identity(path)
            if found is None:
                before = None
            elif found != before and self._subscription is not None:
                self._ask(f"the file {path}")
                return

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

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._storage.make_directory(self._directory)
        super().set(key, value)

    def delete(self, key: str) -> None:
        """Leave it: the directory goes as a whole."""


def _sweep(storage: Storage, own: str) -> None:
    """Remove what lives that are over have left: another one that opens the run may be alive, and about to end."""
    with contextlib.suppress(CheckpointError):
        now = storage.now()
        for name in storage.list():
            if name.startswith(_FOLDER) and name != own and is_old(storage, name, now):
                storage.delete_tree(name)


def _act(numbers: list[int]) -> None:
    for number in numbers:
        _log.warning("%s came when the job was done: it acts now", signal.Signals(number).name)
        os.kill(os.getpid(), number)


def _standing(step: int | None) -> str:
    return "nothing is committed yet" if step is None else f"step {step} is the last one committed"


def _identity(path: str) -> tuple[int, int] | None:
    """Return what changes when a file is made or touched, None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _ended(watch: Watch) -> None:
    """Tell the other ranks that what was never closed comes to no further step."""
    watch.close(failed=True)


_living: Living[Watch] = Living(forked=Watch.forked, ended=_ended)
