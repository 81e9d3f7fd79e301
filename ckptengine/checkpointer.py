"""The policy: when to save, what to keep, what to restore, and what a failed save does."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

from ckptengine.catalog.keep import Best, checked_best
from ckptengine.catalog.listing import step_directory
from ckptengine.catalog.metrics import check_names, checked_metrics
from ckptengine.catalog.naming import open_checkpoint
from ckptengine.comm.base import Communicator
from ckptengine.comm.select import current
from ckptengine.errors import CheckpointError, StateError
from ckptengine.load.loader import LoadOptions, load_newest, restore_newest, tell_leftovers
from ckptengine.policy.arguments import checked_state, checked_step
from ckptengine.policy.exporting import Export
from ckptengine.policy.failures import Failures
from ckptengine.policy.hook import Commit
from ckptengine.policy.interval import Auto
from ckptengine.policy.line import Line, Standing
from ckptengine.policy.opening import Opening
from ckptengine.policy.preemption import Preemption
from ckptengine.policy.rules import Policy
from ckptengine.policy.saves import Saves
from ckptengine.policy.schedule import Schedule
from ckptengine.policy.settings import Settings, tiers_of
from ckptengine.policy.watch import Watch
from ckptengine.save.handle import SaveHandle, SaveStats
from ckptengine.save.saver import DEFAULT_TIMEOUT, Saver
from ckptengine.save.turn import Turn, Turns
from ckptengine.state.rename import Rename
from ckptengine.state.report import LoadReport
from ckptengine.state.select import module_names

__all__ = ["Checkpointer"]

_PREEMPTION = Preemption()

_log = logging.getLogger("ckptengine")


class Checkpointer:
    """Save a training state in the background when a save is due, and restore the newest checkpoint.

    Collective: all ranks make it alike, and call the same methods in order. It is a context manager, or has `close`.

    Where checkpoints go:

    - `run`: a directory that all ranks see, or a URL that fsspec opens (`s3://bucket/run`), with `storage_options` for
      its file system. This is the persistent tier.
    - `local`: a directory on each node's own disk, or a shared one. Saves commit there, and a background task uploads
      them to `run`, at most `upload_bytes_per_second` on each rank (bytes per second; None: no limit). `close` waits
      for the newest upload.
    - `memory`: True (below /dev/shm), or a directory on a tmpfs. Snapshots then lie in shared memory, where they
      outlive this process: started again on the same machine, the job continues from the last one.

    When to save, and what to keep:

    - `every`: a number of steps; a time such as `"90s"` or `"10min"` (rank 0's clock decides); `"auto"` or an `Auto`:
      as often as the measured cost allows; None: only `save` saves.
    - `keep_last`: how many of the newest checkpoints to keep along the line that led to the newest (None: all).
      `{"local": 2, "s3": 10}` gives each tier its own number, under the names `memory`, `local`, and `run` or the URL's
      protocol.
    - `keep_every`: also keep the checkpoints whose step is a multiple of it.
    - `keep_best`: also keep the best by a metric that `step` is given: `"loss"` the one with the lowest,
      `Best("accuracy", count=3, mode="max")` the three with the highest; a list holds several.
    - `policy`: a `Policy` of rules, in place of these four shorthands.

    How a save runs:

    - `on_error`: `"warn"` logs a failed save and lets training continue, until `max_failures` in a row. `"raise"`
      raises at the next call, after that call's own save has been started, so that the ranks stay in step.
    - `when_busy`: a save that is due while another one is in flight waits for it (`"wait"`), or is skipped on all ranks
      (`"skip"`).
    - `check_replicas`: as for `ckptengine.save`.
    - `overlap`: copy what only an optimizer's step changes (its parameters, and its own tensors) while training
      continues. The next step of any optimizer waits for the copy; call `fence` before code that changes parameters in
      another way. Without it everything is copied before the call returns.
    - `arena_nbytes`: bound for the host memory that holds the snapshot, in bytes. By default it is as large as what the
      rank writes. With less, the call lasts as long as the storage takes.
    - `metadata`: plain JSON for each manifest.
    - `timeout`: seconds; bounds every wait for other ranks or for the storage.
    - `comm`: the ranks that save together; by default those of what is initialized (torch.distributed, MindSpore, MPI).

    What else happens:

    - `on_commit`: a function that is called with a `Commit` on rank 0, in a thread of its own, once a checkpoint is
      durable, and with a local tier again when it has been uploaded: to evaluate, export or register it. The checkpoint
      is not deleted meanwhile. An exception in the function is logged and changes nothing. `close` waits for the
      function, for at most `timeout` seconds.
    - `export_every`, `export`: export the checkpoints whose step is a multiple of `export_every`, as the `Export` says:
      `export_every=5000, export=Export("hub/step-{step}", only=["model"], rename={"model": ""})`. A save is due at
      these steps, too. An export that the end of the process cut off is repeated after `restore`.
    - `preemption`: when the job is told to end, by default by SIGTERM or SIGUSR1 to any rank, all ranks save the same
      step and `step` raises `Preempted`, which ends the process with the exit code 75; see `Preemption`. None leaves
      signals alone, and so does every Checkpointer until its first `step` or `save`. If several in one process train,
      the one that began last acts.

    Raises `TypeError` or `ValueError` for wrong arguments, or other ones on some ranks; `StorageError` if the run can't
    be opened or is another kind of directory; `DeadlineError` naming the ranks that did not come.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        every: int | str | Auto | None = None,
        keep_last: int | Mapping[str, int] | None = None,
        *,
        local: str | os.PathLike[str] | None = None,
        memory: bool | str | os.PathLike[str] = False,
        keep_every: int | None = None,
        keep_best: str | Best | Sequence[str | Best] | None = None,
        policy: Policy | None = None,
        preemption: Preemption | None = _PREEMPTION,
        on_error: Literal["warn", "raise"] = "warn",
        max_failures: int = 3,
        when_busy: Literal["wait", "skip"] = "wait",
        check_replicas: str | bool = "first",
        overlap: bool = False,
        arena_nbytes: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_commit: Callable[[Commit], object] | None = None,
        export_every: int | None = None,
        export: Export | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        comm: Communicator | None = None,
        storage_options: Mapping[str, Any] | None = None,
        upload_bytes_per_second: float | None = None,
    ) -> None:
        settings = Settings.of(
            run=run, every=every, keep_last=keep_last, local=local, memory=memory, keep_every=keep_every,
            keep_best=keep_best, policy=policy, preemption=preemption, on_error=on_error, max_failures=max_failures,
            when_busy=when_busy, check_replicas=check_replicas, overlap=overlap, arena_nbytes=arena_nbytes,
            metadata=metadata, on_commit=on_commit, export_every=export_every, export=export, timeout=timeout,
            comm=comm, storage_options=storage_options, upload_bytes_per_second=upload_bytes_per_second,
        )  # fmt: skip
        self.run, self._settings = settings.run, settings
        self._timeout = timeout = settings.timeout
        self._comm = comm = settings.comm or current(timeout)
        self._tiers = tiers_of(settings, comm)
        self._opening = Opening(settings, self._tiers, comm)
        weakref.finalize(self, self._tiers.forget).atexit = False
        weakref.finalize(self, self._opening.let_go)
        token = self._opening.open()
        images = self._tiers.kept_images
        self._saver = Saver(comm, timeout, overlap=overlap, arena_nbytes=settings.arena_nbytes, memory=images)
        self._line = Line(self.run, self._tiers, settings.hooks)
        self._turns = Turns(f"step, save, restore or close of {self.run}")
        failures = Failures(settings.raises, settings.max_failures)
        self._saves = Saves(Schedule(settings.policy.save_rules, comm, timeout), failures, comm.rank == 0)
        self._standing = Standing(self._saves, self._line, self._opening)
        self._closed = False
        self._watch: Watch | None = None
        if settings.preemption is not None:
            persistent = self._tiers.places.persistent
            self._watch = Watch(settings.preemption, comm, persistent, token, self.run, timeout, self._standing)
            weakref.finalize(self, self._watch.forget).atexit = False

    def restore(
        self,
        state: Mapping[str, Any],
        step: int | None = None,
        *,
        best: str | Best | None = None,
        only: Iterable[str] | None = None,
        rename: Rename | None = None,
        strict: bool = True,
        cast: bool = False,
        verify: bool = True,
    ) -> int | None:
        """Fill `state` from the newest valid checkpoint and return its step, or None if there is none. Collective.

        A damaged checkpoint is reported, and its parent is tried. With `step`, restore that step and continue from
        there: later steps become an abandoned branch. With `best`, the name of a metric whose lowest value is the best,
        or a `Best`, do so with the best of the newest checkpoint and its parents. Other options: see `ckptengine.load`.

        With `only`, in a job that has restored or saved already, read parts of the job's current checkpoint (or of
        `step`) again and change nothing else: the next save still follows the last one.

        Raises `CheckpointNotFoundError` if there is no checkpoint of `step` or with the metric, or only another
        library's; `StorageError` if one can't be read, `CheckpointDamagedError` if all are damaged; `LoadMismatchError`
        if the state doesn't match, `RestoreDifferenceError` if it differs afterwards; `ValueError` if ranks differ.
        """
        with self._turn("restore"):
            began = time.monotonic()
            checked_state(state)
            rules = checked_best("best", best)
            if len(rules) > 1 or (rules and step is not None):
                raise ValueError(f"restore(step={step!r}, best={best!r}): give either a step or one metric")
            self._opening.restoring()
            self.wait()
            self._saver.settle(self._timeout)  # what cleans up after a save must not meet what is read
            again = only is not None and (self._line.parent is not None or self._saves.any)
            arguments = {"step": step, "best": rules[0] if rules else None, "only": "given" if again else None}
            if again and step is None and not rules:
                step = self._saves.committed
            options = LoadOptions.of(only, rename, strict, cast, verify)
            sources, persistent = self._tiers.sources, self._tiers.places.persistent
            loaded = restore_newest(
                sources.views(), state, self._comm, self._timeout, options, step, rules[0] if rules else None,
                sources.upload_for_all, persistent.location(), arguments,
            )  # fmt: skip
            if loaded is not None:
                tell_leftovers(loaded, self._comm)
            if again:
                return None if loaded is None else loaded.step
            # What follows is a new life of the run, also where this process has saved before.
            parent = None if loaded is None or loaded.step is None else (loaded.generation, loaded.step)
            self._line.restart(parent)
            self._saves.restart(None if parent is None else parent[1])
            if loaded is None or parent is None:
                self._opening.tell_foreign()
                return None
            if self._comm.rank == 0:
                seconds = time.monotonic() - began
                _log.info("%s: restored %s in %.3g s", self.run, loaded.location, seconds)
                if self._settings.exporting is not None:
                    path = persistent.location(step_directory(parent[1]))
                    self._settings.exporting.restored(parent[1], path, loaded.attempt)
            self._tiers.restored(*parent)
            self._saver.prepare(state)
            return parent[1]

    def warm_start(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        only: Iterable[str] | None = None,
        rename: Rename | None = None,
        strict: bool = False,
        cast: bool = False,
        verify: bool = True,
        storage_options: Mapping[str, Any] | None = None,
    ) -> LoadReport:
        """Load the weights of another run's newest checkpoint and return a `LoadReport`. Collective.

        Use it to start on new data, with another optimizer or with a new head. `path` names a checkpoint as in
        `ckptengine.load`. Without `only`, fill the modules of `state` and nothing else: not the step, the optimizer,
        the scheduler or the cursor. What does not match keeps its values and is in the report, which prints as a table;
        with `strict=True` it is raised. The other options are those of `ckptengine.load`. Call it only if `restore`
        returned None, so that a restarted job continues its own work.

        Raises `StateError` if this run has been restored or has saved already, or if `state` has no modules and `only`
        is missing; `LoadMismatchError` if nothing matches at all; otherwise what `ckptengine.load` raises.
        """
        with self._turn("warm_start"):
            checked_state(state)
            self._opening.check_place()
            if self._line.parent is not None or self._saves.any:
                raise StateError(
                    f"{self.run}: warm_start would overwrite what this run has trained so far; call it only where "
                    "restore returned None"
                )
            options = LoadOptions.of(module_names(state) if only is None else only, rename, strict, cast, verify)
            if not options.only:
                raise StateError("the state has no modules: name with `only=` what warm_start should load")
            storage = open_checkpoint(path, storage_options, timeout=self._timeout)
            loaded = load_newest(storage, state, self._comm, self._timeout, options)
            if self._comm.rank == 0:
                level = logging.INFO if loaded.report.complete else logging.WARNING
                _log.log(level, "%s: warm start from %s: %s", self.run, loaded.location, loaded.report)
            return loaded.report

    def step(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> SaveHandle | None:
        """Save if a save is due after this step; return its `SaveHandle`, None if none is due or it failed. Collective.

        `metrics`, such as `{"loss": 0.1}`, are numbers or tensors of one element; rank 0's are stored with the
        checkpoint, for `keep_best` and `restore(best=…)`, and `ckptengine ls` shows them.

        `on_error` decides about a save that fails. But if the first save fails because something can't be saved at all
        (`StateError`), that is raised at once, since later saves would fail, too. Raises `RunInUseError` at the first
        step if another running job writes to the run, `ValueError` for a step below one that was saved since the last
        restore, and `Preempted` if the job was told to end, once this step is durable.
        """
        with self._turn("step"):
            check_names(metrics)
            step = self._enter(step, state)
            handle = None
            self._saves.reap()
            self._saves.trained(step)
            if self._watch is not None and self._watch.arrive():
                self._preempt(self._watch, step, state, metrics)
            if self._saves.schedule.due(step):
                handle = self._save_due(step, state, metrics)
            else:
                self._saver.prepare(state)
            self._saves.failures.raise_due()
            return handle

    def save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> SaveHandle:
        """Save now, in the background, and return the `SaveHandle`. Collective.

        If this step was saved already since the last restore, return the handle of that save. `metrics` are those of
        `step`.

        Raises `ValueError` for a step below one that was saved since the last restore, or from 10**18 on; `StateError`,
        `StorageError` or `DeadlineError` if the snapshot is impossible; `RunInUseError` and `Preempted` as `step` does;
        with `on_error="raise"` also what made an earlier save fail.
        """
        with self._turn("save"):
            step = self._enter(step, state)
            if self._watch is not None and self._watch.arrive():
                self._preempt(self._watch, step, state, metrics)
            handle = self._save(step, state, metrics)
            self._saves.failures.raise_due()
            return handle

    def _turn(self, doing: str) -> Turn:
        """Return the turn of a call; raises `CheckpointError` after `close`."""
        if self._closed:
            raise CheckpointError(
                f"{doing} of {self.run}: this Checkpointer is closed (its `with` block has ended, or close() was "
                "called), and nothing more is saved or restored by it; make another one"
            )
        return self._turns.take(self._timeout)

    def _enter(self, step: int, state: Mapping[str, Any]) -> int:
        """Check what `step` and `save` are given, and begin to write to the run; return the step's number."""
        step = checked_step(step, state)
        checked_state(state)
        self._line.check(step)
        self._opening.begin()
        return step

    def _save_due(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> SaveHandle | None:
        if self._settings.skips and self._is_busy():
            _log.warning('step %d: not saved, because the previous save is still in flight (when_busy="skip")', step)
            return None
        try:
            return self._save(step, state, metrics)
        except CheckpointError as error:
            if isinstance(error, StateError) and not self._line.started:
                raise
            self._saves.failed(error, f"step {step} of {self.run}")
            return None

    def _save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> SaveHandle:
        """Save; what became of earlier saves is raised afterwards.

        Ranks learn of a failure at different steps. Raised before the save, it would keep one rank out of a save that
        the others are in, and if the caller goes on after it, each rank would save another step from then on.
        """
        directory, numbers = step_directory(step), checked_metrics(metrics)
        self._saver.wait(self._timeout, directory)
        self._saves.reap()
        self._saves.correct()
        if (handle := self._saves.of(step)) is not None:
            self._saves.trained(step)
            if numbers:
                self._saves.tell_not_stored(step, self.run)
            return handle
        self._saves.schedule.started()
        target = self._line.target(step, self._settings.metadata, numbers)
        with self._line.saving(step, self._saver):
            handle = self._saver.start(target, state, self._settings.check_replicas)
        self._saves.add(step, handle)
        return handle

    def fence(self, timeout: float | None = None) -> None:
        """Wait until the current snapshot is complete, before the state is changed other than by an optimizer's step.

        Needed with `overlap` only. Raises `DeadlineError` after `timeout` seconds (None: the Checkpointer's own).
        """
        self._saver.fence(timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the saves in flight are durable; `on_error` decides about failed ones.

        Raises `DeadlineError` after `timeout` seconds (None: when the save's own time is over).
        """
        self._saves.wait(timeout)
        self._saves.failures.raise_due()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until the newest checkpoint is durable and uploaded from the local tier to `run`. Collective.

        Show a progress bar on rank 0. Raises `SaveFailedError`, which says where the checkpoint is, if no byte moves
        for `timeout` seconds (None: the Checkpointer's own).
        """
        self.wait(timeout)
        timeout = self._timeout if timeout is None else timeout
        self._saver.settle(timeout)  # what is to be moved is said after the commit
        self._tiers.flush(timeout)

    @property
    def history(self) -> list[SaveStats]:
        """The `SaveStats` of the saves that this process has committed, oldest first."""
        return self._saves.history

    @property
    def uploaded(self) -> int | None:
        """On rank 0 the newest step that this job has uploaded from the local tier to `run`; None on other ranks."""
        return self._tiers.uploaded

    def close(self) -> None:
        """Wait for the saves in flight and until the newest checkpoint is in `run`, then free the memory. Collective.

        The Checkpointer can't be used afterwards. Raises what `flush` raises, and `SaveFailedError` if the very last
        save has failed, so that the job does not seem to have succeeded.
        """
        self._close(failed=False)

    def _close(self, failed: bool) -> None:
        if self._closed:
            return
        with self._turns.take(self._timeout):
            self._closed = True
            if failed and self._watch is not None:
                # At once: the others must not wait for this rank, nor the launcher's signal for the saves in flight.
                self._watch.close(failed)
            done = idle = False
            try:
                self.wait()
                # Of several ranks, some may be dead where one has failed: the next start uploads what is left.
                if not failed or self._comm.world_size == 1:
                    self.flush()
                # What could not be made durable may still be in memory, on all ranks.
                done = not failed and not self._saves.failures.count
                if not failed and self._saves.failures.count:
                    self._tiers.tell_kept()
                for late in [] if failed else self._settings.hooks.settle(self._timeout):
                    _log.warning(
                        "%s: %s still runs after %g s; close() no longer waits for it", self.run, late, self._timeout
                    )
            finally:
                try:
                    idle = self._saver.close()
                finally:
                    self._tiers.close(done=done and idle, idle=idle)
                    self._opening.close()
                    if self._watch is not None:
                        self._watch.close()
        self._saves.correct()
        if self._comm.rank == 0:
            _log.info("%s: closed; the newest committed step is %s", self.run, self._standing())
        if not failed:
            self._saves.failures.raise_last(self._standing())

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            if self._settings.policy.save:
                self._saves.tell_unsaved(self.run, self._settings.policy.describe())
            return
        try:
            self._close(failed=True)
        except CheckpointError as problem:
            _log.warning("%s: closing after the training error below failed, too: %s", self.run, problem)

    def _preempt(
        self, watch: Watch, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any] | None
    ) -> NoReturn:
        """Save the step at which all ranks stop, wait until it is durable, and leave."""
        problem, saved = "", None
        try:
            numbers = checked_metrics(metrics)
        except TypeError as error:  # the checkpoint matters more
            _log.warning("step %d of %s: saved without its metrics: %s", step, self.run, error)
            numbers = {}
        expected = max((stats.durable_seconds for stats in self._saves.history[-3:]), default=0.0)
        watch.saving(step)
        try:
            if watch.left is not None and expected > watch.left:
                problem = (
                    f"step {step} was not saved: that takes {expected:.3g} s, {max(0.0, watch.left):.3g} s are left"
                )
            else:
                self._save(step, state, numbers).durable.result()
                saved = step
                if self._tiers.places.local is not None:
                    # The machine may be what is taken away.
                    self.flush(self._timeout if watch.left is None else max(1.0, min(watch.left, self._timeout)))
        except CheckpointError as error:
            problem = f"step {step} was NOT saved: {error}" if saved is None else f"{error}"
        self._saves.end()
        self._tiers.stop()  # before the ranks leave each other's store
        watch.leave(saved, problem)

    def _pause(self) -> None:
        """Let signals act as they would without us until the next call of `step` or `save`: the training has ended."""
        if self._watch is not None:
            self._watch.pause()

    def _is_busy(self) -> bool:
        """Return whether rank 0 has a save in flight: one answer for all ranks."""
        mine = bytes([self._saver.busy]) if self._comm.rank == 0 else None
        return self._comm.broadcast(mine, self._timeout) != b"\0"
