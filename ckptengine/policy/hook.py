"""What the user has called after each commit: one thread does it, and what it reads is not deleted meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckptengine.catalog.manifest import Manifest
from ckptengine.lifecycle import Living
from ckptengine.save.handle import SaveStats

__all__ = ["Commit", "CommitHook", "CommitHooks"]

_MOST_WAITING = 8
"""So many commits may wait for their call, and keep their checkpoints; a slower hook must not fill the disk."""

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class Commit:
    """Describe a committed checkpoint to `on_commit`.

    - `step`, `path`: its step, and its path or URL as `ckptengine.load` takes it.
    - `metrics`: the numbers that were saved with it; None for a value that was not finite.
    - `persistent`: whether it is in the persistent tier. With a local tier there is a call for the local commit, with
      False, and another one when the checkpoint has been uploaded.
    - `stats`: rank 0's statistics of the save; None for an upload.
    - `restored`: whether the call follows a restore, not a save.
    - `attempt`: the manifest's id of the save. A step that is trained and saved again has another one.
    """

    step: int
    path: str
    metrics: Mapping[str, float | None]
    persistent: bool
    stats: SaveStats | None = None
    restored: bool = False
    attempt: str = ""


class CommitHook:
    """Calls a function with each commit, in their order, in a thread of its own on rank 0.

    `name` is what the function was passed as. What the function raises is logged. Of more than 8 commits that wait, the
    oldest is passed over, which is logged.
    """

    def __init__(self, call: Callable[[Commit], object], name: str = "on_commit") -> None:
        self._call, self.name = call, name
        self._changed = threading.Condition()
        self._waiting: deque[Commit] = deque()
        self._attempt = ""  # of the commit whose call is under way
        self._thread: threading.Thread | None = None
        _living.add(self)

    def saved(self, manifest: Manifest, stats: SaveStats, persistent: bool) -> None:
        """Have the function called for a save that has been committed."""
        self._offer(_commit(manifest, stats.path, persistent, stats))

    def uploaded(self, manifest: Manifest, path: str) -> None:
        """Have the function called for a checkpoint that has come to the run's own place."""
        self._offer(_commit(manifest, path, persistent=True))

    def restored(self, step: int, path: str, attempt: str) -> None:
        """Have the function called for a checkpoint that was restored from the run's own place."""
        self._offer(Commit(step, path, {}, persistent=True, restored=True, attempt=attempt))

    def _offer(self, commit: Commit) -> None:
        with self._changed:
            self._waiting.append(commit)
            if len(self._waiting) > _MOST_WAITING:
                late = self._waiting.popleft()
                _log.warning(
                    "%s: %s is slower than the saves, so it is not called for this one: save less often, or have it "
                    "only note what is to be done",
                    late.path,
                    self.name,
                )
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="ckptengine-on-commit", daemon=True)
            thread = self._thread
        try:
            thread.start()
        except RuntimeError as error:  # the system, or an interpreter that is ending, refuses more
            with self._changed:
                self._thread = None
                self._waiting.clear()
            _log.warning("%s: %s was not called, because its thread did not start: %s", commit.path, self.name, error)

    def protected(self) -> set[str]:
        """Return the attempts whose checkpoints stay for the calls that are to come, or under way."""
        with self._changed:
            return {commit.attempt for commit in self._waiting} | ({self._attempt} if self._attempt else set())

    def settle(self, timeout: float) -> bool:
        """Wait until no call is left to do; return whether that came in `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, max(0.0, deadline - time.monotonic()))

    def abandon(self) -> None:
        """Forget what waits, in a forked process: it is the parent's."""
        self._changed = threading.Condition()
        self._waiting.clear()
        self._thread, self._attempt = None, ""

    def _run(self) -> None:
        while True:
            with self._changed:
                self._attempt = ""
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                commit = self._waiting.popleft()
                self._attempt = commit.attempt
            try:
                self._call(commit)
            except BaseException as error:  # sys.exit() in it ends nothing but this call
                _log.warning(
                    "%s: %s failed; the checkpoint is not affected: %s", commit.path, self.name, error, exc_info=True
                )


def _commit(manifest: Manifest, path: str, persistent: bool, stats: SaveStats | None = None) -> Commit:
    if manifest.step is None:
        raise AssertionError("unreachable: a run's checkpoints have steps")
    return Commit(manifest.step, path, manifest.metrics, persistent, stats, attempt=manifest.attempt)


class CommitHooks:
    """All that is called with each commit; each in a thread of its own, so that none waits for another."""

    def __init__(self, *hooks: CommitHook) -> None:
        self._hooks = hooks

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def saved(self, manifest: Manifest, stats: SaveStats, persistent: bool) -> None:
        """Have all called for a save that has been committed."""
        for hook in self._hooks:
            hook.saved(manifest, stats, persistent)

    def uploaded(self, manifest: Manifest, path: str) -> None:
        """Have all called for a checkpoint that has come to the run's own place."""
        for hook in self._hooks:
            hook.uploaded(manifest, path)

    def protected(self) -> set[str]:
        """Return the attempts whose checkpoints stay for the calls that are to come, or under way."""
        return {attempt for hook in self._hooks for attempt in hook.protected()}

    def settle(self, timeout: float) -> list[str]:
        """Wait until no call is left to do; return the names of those that `timeout` seconds were too short for."""
        deadline = time.monotonic() + timeout
        return [hook.name for hook in self._hooks if not hook.settle(max(0.0, deadline - time.monotonic()))]


_living: Living[CommitHook] = Living(forked=CommitHook.abandon)
