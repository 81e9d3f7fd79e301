"""Watches for the word that the job is to end, and brings all ranks to the same step and out."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from ckptengine.catalog.lease import is_old
from ckptengine.catalog.receipt import StorageStore
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError
from ckptengine.lifecycle import Living, at_exit
from ckptengine.policy.agreement import Agreement, Limit, Request, Verdict
from ckptengine.policy.ending import Ending
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
_FOLDER = "preemption-"
"""How the directories are named in which ranks without a store of their own leave their messages."""

_log = logging.getLogger("ckptengine")


class Watch:
    """The preemption of one Checkpointer's life; every rank has one.

    Threads wait for a signal, for the file and for other ranks' word; the training's thread calls `arrive` in every
    `step` of the Checkpointer, and that compares two numbers. The calls are counted, not the steps: the ranks make the
    same calls, whatever numbers the steps have. `stands`, `name` and `timeout` are those of `Ending`.

    With the first call it begins to act: only who trains has something to save. Until then signals do what they would
    do without it, the file is not obeyed yet, other ranks are answered (the call to come is the first), and the
    process is not ended. So it is again after `pause`.

    It has many attributes, because three threads and the handlers of signals meet in it: those from `_calls` to
    `_verdict` are what they tell each other under `_changed`, the others are what each has to let go of at the end.
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
        self._preemption, self._comm, self._name = preemption, comm, name
        self._ending = Ending(preemption, comm.rank, name, timeout, stands)
        self._changed = threading.Condition()
        self._calls = 0
        self._limit: int | None = None
        self._turn = 0  # in which the limit was told
        self._verdict: Verdict | None = None
        self._arrived: dict[int, float] = {}
        self._leaving_since: float | None = None
        self._closed = threading.Event()
        self._lost = False  # the store is gone: no agreement is possible any more
        self._process = os.getpid()
        self._subscription: Subscription | None = None
        self._agreement: Agreement | None = None
        self._folder: tuple[Storage, str] | None = None
        self._threads: list[threading.Thread] = []
        if comm.world_size > 1:
            store, prefix = comm.store(), f"ckptengine/preemption/{token}"
            if store is None:
                self._folder = storage, f"{_FOLDER}{token}"
                store, prefix = _FolderStore(*self._folder), "ask"
                if comm.rank == 0:
                    _sweep(*self._folder)
            self._agreement = Agreement(store, comm.rank, comm.world_size, prefix, timeout)
            self._start("agree", self._agree, self._agreement)
        if preemption.file is not None and comm.rank == 0:
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
        stop here. But one of them may be waiting for this rank, in a call that keeps its threads from answering: then
        this turn of the agreement ends without a verdict, and training goes on until the next. Raises `DeadlineError`
        where the store can't be asked.
        """
        with self._changed:
            self._calls += 1
        if self._subscription is None and not self._closed.is_set():
            self._subscription = subscribe(self._preemption.numbers, self._name, self._signalled)
        verdict = self._await_verdict()
        if verdict is None:
            return False
        if verdict.kind == "failed":
            self._end_disagreed(verdict)
        return verdict.kind == "stop" and self._calls >= verdict.call

    def _await_verdict(self) -> Verdict | None:
        """Return the verdict where this rank must not go on without one; None where it may."""
        with self._changed:
            if self._limit is None or self._calls < self._limit:
                return None
            turn, agreement = self._turn, self._agreement
            if self._heard(1.0 if agreement is None else agreement.patience(turn)):
                return self._verdict
        problem = "nobody answers"
        if agreement is not None:
            try:
                verdict = agreement.give_way(turn)
            except CheckpointError as error:
                problem = str(error)
            else:
                with self._changed:
                    if verdict is not None:
                        self._verdict = self._verdict or verdict
                    elif self._turn == turn:
                        self._limit = None
                return verdict
        with self._changed:
            wait = _WORD_SECONDS if agreement is None else agreement.seconds + _WORD_SECONDS
            if self._heard(wait):
                return self._verdict
        rank = self._comm.rank
        raise DeadlineError(
            f"rank {rank} got the notice to end, but no decision on the step came within {wait:g} s: {problem}"
        )

    def _heard(self, seconds: float) -> bool:
        """Wait for the verdict, or for the end of the turn without one; return whether either has come."""

        def come() -> bool:
            return self._verdict is not None or self._limit is None or self._calls < self._limit

        return self._changed.wait_for(come, seconds)

    @property
    def left(self) -> float | None:
        """Seconds until this process is ended, None where nothing bounds it."""
        return self._ending.left

    def saving(self, step: int) -> None:
        """Note what is being waited for; without a grace period, the save has its own time."""
        self._ending.saving(step)

    def leave(self, step: int | None, problem: str) -> NoReturn:
        """Wait until all ranks are done here, and raise `Preempted`; `step` was saved, or `problem` says why not."""
        self._ending.leaving()
        with contextlib.suppress(CheckpointError):
            self._depart()
        # Handlers stay until the process has ended: the launcher sends SIGTERM to all as soon as the first has.
        self._leaving_since = time.monotonic()
        at_exit(ignore)
        raise self._ending.preempted(step, problem)

    def _depart(self) -> None:
        if self._agreement is None:
            return
        seconds = _DEPART_SECONDS if self.left is None else max(0.1, min(_DEPART_SECONDS, self.left / 2))
        self._comm.barrier(seconds)
        self._leaving_since = time.monotonic()
        self._agreement.depart(seconds)
        if self._folder is not None and self._comm.rank == 0:
            storage, directory = self._folder
            storage.delete_tree(directory)

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
        self._ending.forked()
        self._closed.set()
        self._limit = None
        _living.discard(self)

    # What the threads do.

    def _signalled(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        shared = is_shared(number)
        if self._leaving_since is not None:
            if now - self._leaving_since > _LEAVING and not shared:
                self._ending.end(f"{name} came again", 128 + number)
            return
        first = self._arrived.setdefault(number, now)
        if first == now:
            self._ask(f"{name} on rank {self._comm.rank}")
        elif now - first > _REPEATED and not shared:
            self._ending.end(f"{name} came again", 128 + number)

    def _ask(self, reason: str) -> None:
        """Have all ranks end: from the watching threads, which must not wait for the store."""
        grace = self._preemption.grace
        self._bound(reason, grace)
        agreement = self._agreement
        if agreement is None:
            with self._changed:
                if self._verdict is not None:
                    return
                self._limit = self._calls + 1
                verdict = Verdict("stop", self._limit)
            self._conclude(verdict)
        else:
            self._start("ask", self._request, agreement, Request(reason, grace))

    def _request(self, agreement: Agreement, request: Request) -> None:
        try:
            if self._lost:
                raise CheckpointError("the job's store is gone")
            agreement.request(request)
        except CheckpointError as error:
            self._conclude(Verdict("failed", why=str(error)))

    def _bound(self, reason: str, grace: float | None) -> None:
        if self._ending.bound(reason, grace):
            self._start("deadline", self._watch_deadline)

    def _watch_deadline(self) -> None:
        """Say what is waited for, and end the process when its time is over."""
        told = begun = time.monotonic()
        while (left := self.left) is not None:
            now = time.monotonic()
            if left <= 0 and self._subscription is not None:
                self._ending.overdue(next(iter(self._arrived), None))
            if now - told >= _TELL_SECONDS and (self._comm.rank == 0 or self._arrived):
                told = now
                self._ending.tell(now - begun, left)
            if self._closed.wait(min(1.0, left) if left > 0 else 1.0):
                return

    def _agree(self, agreement: Agreement) -> None:
        """Wait for the word of any rank, and agree with all others on the step."""
        request = None
        try:
            request = agreement.wait()
            if request is None:
                return
            self._bound(request.reason, request.grace)
            verdict = self._take_turns(agreement)
        except CheckpointError as error:
            self._lost = True
            if request is None and not self._arrived:
                return  # the host of the store has ended, as at the end of a job; whoever trains on will notice
            verdict = Verdict("failed", why=str(error))
        self._conclude(verdict)

    def _take_turns(self, agreement: Agreement) -> Verdict:
        """Tell this rank's limit until all ranks' stand at the same time; return what follows from them.

        After a turn that a rank has ended, training goes on for a pause, and then up to a limit that lies as many calls
        ahead as it has made in that pause. So nobody is held back yet when those answer who come late: one that waits
        for others in each step, and keeps the lock meanwhile, comes late in every turn.
        """
        before = self._calls
        for turn in itertools.count():
            with self._changed:
                self._turn, self._limit = turn, self._calls + 1 + (self._calls - before if turn else 0)
                limit = Limit(self._limit)
            agreement.publish(limit, turn)
            verdict = agreement.decide(turn) if self._comm.rank == 0 else agreement.hear(turn)
            if verdict is not None:
                return verdict
            with self._changed:
                self._limit = None
                before = self._calls
                self._changed.notify_all()
            if self._closed.wait(agreement.pause(turn)):
                break
        return Verdict("over")

    def _conclude(self, verdict: Verdict) -> None:
        """Go by a verdict. What fails when there is one changes nothing: the others go by it, and need this rank."""
        with self._changed:
            if self._verdict is not None and verdict.kind == "failed":
                return
            self._verdict = self._verdict or verdict
            calls = verdict.call - self._calls
            self._changed.notify_all()
        if verdict.kind == "failed" and self._subscription is not None:
            self._end_disagreed(verdict)
        if verdict.kind == "stop" and self._comm.rank == 0:
            which = "the next" if calls == 1 else f"the {calls}th from now on"
            _log.warning("%s: all ranks save the same step, %s of rank 0, and end", self._ending.reason, which)

    def _end_disagreed(self, verdict: Verdict) -> NoReturn:
        self._ending.end(f"the ranks could not agree on a step: {verdict.why}")

    def _watch_file(self, path: str) -> None:
        """Rank 0: look for the file once a second; a thread of its own, since a file system may hang."""
        before = _identity(path)
        if before is not None:
            _log.warning("%s exists already: it ends this job only when it is touched or created again", path)
        while not self._closed.wait(_LOOK_SECONDS):
            found = _identity(path)
            if found is None:
                before = None
            elif found != before and self._subscription is not None:
                self._ask(f"the file {path}")
                return


class _FolderStore(StorageStore):
    """A directory of messages that is made when the first one is written."""

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._storage.make_directory(self._directory)
        super().set(key, value)

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one; return the one that it has."""
        self._storage.make_directory(self._directory)
        return super().claim(key, value)

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
        _log.warning("%s arrived when the job had finished: it acts now", signal.Signals(number).name)
        os.kill(os.getpid(), number)


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
