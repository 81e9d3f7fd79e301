"""What is made of failed saves: counted, told, and raised when it is too many."""

from __future__ import annotations

import logging

from ckptengine.errors import SaveFailedError

__all__ = ["Failures"]

_log = logging.getLogger("ckptengine")


class Failures:
    """The saves that have failed since the last one that was committed.

    `raises` has every failure raised at the next occasion, else only from `most` in a row on.
    """

    def __init__(self, raises: bool, most: int) -> None:
        self._raises, self._most = raises, most
        self.count = 0
        self._due: SaveFailedError | None = None
        self._last: tuple[str, Exception] | None = None

    def note(self, error: Exception, path: str) -> None:
        """Count a failed save of `path`."""
        self.count += 1
        self._last = path, error
        if self._raises or self.count >= self._most:
            self._due = SaveFailedError(
                f"{path} was not saved ({self.count} failure(s) in a row): {error}; "
                "checkpoints committed earlier are not affected"
            )
            self._due.__cause__ = error
            return
        counted = f"failure {self.count} of {self._most} in a row"
        _log.error("%s was NOT saved; training continues (%s): %s", path, counted, error)

    def succeeded(self) -> None:
        """Note that a save was committed."""
        self.count, self._last = 0, None

    def raise_due(self) -> None:
        """Raise what is due, once."""
        due, self._due = self._due, None
        if due is not None:
            raise due

    def raise_last(self, stands: int | None) -> None:
        """Raise where the last save of all has failed; `stands` is the newest step that was committed."""
        if self._last is None:
            return
        path, error = self._last
        there = "nothing is committed" if stands is None else f"step {stands} is the last one committed"
        what = f"{error}" if path in f"{error}" else f"{path} was not saved: {error}"
        raise SaveFailedError(f"the last save of this job failed: {what}; {there}") from error
