"""The saves of one job: which are in flight, what became of them, and which step stands."""

from __future__ import annotations

import logging

from ckptengine.policy.failures import Failures
from ckptengine.policy.schedule import Schedule
from ckptengine.save.handle import SaveHandle, SaveStats

__all__ = ["Saves"]

_log = logging.getLogger("ckptengine")


class Saves:
    """Accounts for saves that end in the background; what became of them counts from the next call on.

    `tells` is whether this rank logs what is the same on all: that a save is committed, or was not made.
    """

    def __init__(self, schedule: Schedule, failures: Failures, tells: bool) -> None:
        self.schedule, self.failures, self._tells = schedule, failures, tells
        self.history: list[SaveStats] = []
        self.committed: int | None = None
        """The step at which this life of the run stands: restored, or committed since."""
        self._pending: list[SaveHandle] = []
        self._last: tuple[int, SaveHandle] | None = None
        self._given_up: tuple[int, SaveHandle] | None = None  # the last one, where it failed
        self.unsaved: int | None = None
        """The last step that was trained, where no save of it was started."""

    def restart(self, step: int | None) -> None:
        """Begin a new life of the run, at a step that was restored, or at none."""
        self._last = self._given_up = self.unsaved = None
        self.committed = step
        self.schedule.restart()

    def trained(self, step: int) -> None:
        """Note a step that has been trained, whether it is saved or not."""
        self.unsaved = step if self.of(step) is None else None

    def tell_unsaved(self, run: str, due: str) -> None:
        """Warn of a last step that was trained and not saved; `due` says when saves are."""
        if self.unsaved is not None and self._tells:
            _log.warning(
                "step %d of %s was trained but not saved (saves are due %s): call ckpt.save(step, state) after the "
                "loop to save it",
                self.unsaved,
                run,
                due,
            )

    def tell_not_stored(self, step: int, run: str) -> None:
        """Warn of metrics that came after the save of their step."""
        if self._tells:
            _log.warning(
                "step %d of %s is saved already, so these metrics are not stored: pass them to the call that saves the "
                "step",
                step,
                run,
            )

    @property
    def any(self) -> bool:
        """Whether this life has a save that is in flight or committed."""
        return self._last is not None

    def of(self, step: int) -> SaveHandle | None:
        """Return the handle of the last save where it is that of a step, else None."""
        return self._last[1] if self._last is not None and self._last[0] == step else None

    def add(self, step: int, handle: SaveHandle) -> None:
        """Note a save that has been started."""
        self._last, self.unsaved = (step, handle), None
        self._pending.append(handle)

    def wait(self, timeout: float | None) -> None:
        """Wait until those in flight have ended; raises `DeadlineError` (None: when each one's own time is over)."""
        for handle in list(self._pending):
            if not handle.durable.wait(timeout):
                raise handle.durable.overdue(timeout)
        self.reap()

    def end(self) -> None:
        """Wait for all that are in flight, each for its own time at most, and account for those that have ended."""
        for handle in self._pending:
            handle.durable.wait()
        self.reap()

    def reap(self) -> None:
        """Account for the saves that have ended since the last call."""
        while self._pending and self._pending[0].durable.done():
            handle = self._pending.pop(0)
            try:
                stats = handle.durable.result(0)
            except Exception as error:
                self.failed(error, handle.path)
            else:
                self._succeeded(stats)

    def _succeeded(self, stats: SaveStats) -> None:
        self.history.append(stats)
        self.schedule.learn(stats)
        self.failures.succeeded()
        self.committed = stats.step
        if self._tells:
            _log.info(
                "%s: committed, %s bytes by this rank; stall %.3g s, durable after %.3g s",
                stats.path,
                f"{stats.nbytes:,}",
                stats.stall_seconds + stats.waited_seconds,
                stats.durable_seconds,
            )

    def failed(self, error: Exception, path: str) -> None:
        """Account for a save that has failed, or could not be started."""
        self.schedule.failed()
        last, self._last = self._last, None  # the same step may be tried again
        if last is not None and last[1].durable.error is not None:
            self._given_up = last
        self.failures.note(error, path)

    def correct(self) -> None:
        """Take a save back that this rank has told as failed, where rank 0 has said since that it is committed.

        Then the others take the same step as saved, and this rank must not begin to save it alone.
        """
        given_up = self._given_up
        if given_up is not None and given_up[1].durable.error is None:
            self._given_up, self._last = None, self._last or given_up
            self._succeeded(given_up[1].durable.result(0))

    def newest(self) -> int | None:
        """Return the newest step that was committed in this process, None where none was; any thread may ask."""
        for handle in reversed(list(self._pending)):
            if handle.durable.done() and handle.durable.error is None:
                return handle.durable.result(0).step
        return self.history[-1].step if self.history else None
