"""When a save is due."""

from __future__ import annotations

import logging
import math
import statistics
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence

from ckptengine.comm.base import Communicator
from ckptengine.policy.interval import Auto
from ckptengine.policy.rules import AtSteps, Every, SaveRule
from ckptengine.save.handle import SaveStats

__all__ = ["Schedule"]

_REMEMBERED = 5
"""How many saves the cost is the median of."""

_WORTH_TELLING = 0.2
"""By which part an interval changes before the log says so."""

_MARGIN = 1.25
"""What the interval is longer than the slowest of the last saves, so that no save has to wait for the one before."""

_RETRY_SECONDS = 60.0

_log = logging.getLogger("ckptengine")


class Schedule:
    """Decides after which steps to save, in one place, by the rules of a `Policy`: a save is due where any says so.

    With a time the clock of rank 0 decides for all ranks, who ask together. `clock` returns seconds; it need not be the
    real one.

    With an `Auto` the first save comes at the first step, to find out what a save costs; it is slower than those that
    follow (it plans and finds memory), so the second one comes sooner than its cost asks for. From then on the median
    of the last five without the first counts, as rank 0 saw them: what each took from the training (stall and wait).
    """

    def __init__(
        self,
        rules: Sequence[SaveRule],
        comm: Communicator,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._multiples = [rule.steps for rule in rules if isinstance(rule, Every) and rule.steps is not None]
        self._steps = frozenset(step for rule in rules if isinstance(rule, AtSteps) for step in rule.steps)
        times = [rule.seconds for rule in rules if isinstance(rule, Every) and rule.seconds is not None]
        self._time = min(times, default=math.inf)
        self._auto = next((rule for rule in rules if isinstance(rule, Auto)), None)
        self._cost_allows = 0.0 if self._auto is not None else math.inf  # seconds, for the time being
        self._comm, self._timeout, self._clock = comm, timeout, clock
        self._last_time = clock()
        self._checked: tuple[int, float] | None = None  # step and time of the last look at the clock in this life
        self._next_check = 0
        self._first: SaveStats | None = None
        self._later: deque[SaveStats] = deque(maxlen=_REMEMBERED)
        self._told: float | None = None

    def restart(self) -> None:
        """Begin a new life of the run, from another step and from now on."""
        self._last_time = self._clock()
        self._checked, self._next_check = None, 0

    def started(self) -> None:
        """Note that a save starts now, due or not."""
        self._last_time = self._clock()
        if self._auto is not None and self._first is None:
            self._cost_allows = math.inf  # nothing is due before it has told what it costs

    def failed(self) -> None:
        """Note that a save failed; where none has told its cost yet, the next one is due in a minute."""
        if self._auto is not None and self._first is None:
            self._cost_allows = _RETRY_SECONDS

    def learn(self, stats: SaveStats) -> None:
        """Take what a committed save cost into account."""
        if self._auto is None:
            return
        if self._first is None:
            self._first = stats
            # Soon, but not while the first may be in the way, and never later than its own cost would have it.
            interval, _ = self._auto.interval(_cost(stats), 0.0)
            self._cost_allows = max(_MARGIN * stats.durable_seconds, interval / 3)
            return
        self._later.append(stats)
        cost = statistics.median(map(_cost, self._later))
        least = _MARGIN * max(each.durable_seconds for each in self._later)
        self._cost_allows, reason = self._auto.interval(cost, least)
        if self._told is None or abs(self._cost_allows - self._told) > _WORTH_TELLING * self._told:
            self._told = self._cost_allows
            if self._comm.rank == 0:
                _log.info("saving every %.3g s: a save costs %.3g s, and %s decides", self._told, cost, reason)

    def due(self, step: int) -> bool:
        """Return whether to save after a step, the same on all ranks, who all ask for the same steps."""
        if step in self._steps or any(step % steps == 0 for steps in self._multiples):
            return True
        return (self._auto is not None or self._time < math.inf) and self._due_by_time(step)

    def _due_by_time(self, step: int) -> bool:
        """Let rank 0's clock decide, for all ranks; it also says at which step to ask again.

        Asking is an exchange, so it happens after half of the steps that seem to be left: a few times per save.
        """
        if step < self._next_check:
            return False
        reply = None
        if self._comm.rank == 0:
            now, seconds = self._clock(), min(self._time, self._cost_allows)
            gone = now - self._last_time
            left = gone if seconds == math.inf and gone > 0 else seconds - gone
            ahead = 1
            if self._checked is not None and left > 0:
                checked_step, checked_time = self._checked
                each = (now - checked_time) / max(1, step - checked_step)
                ahead = int(min(left / max(each, 1e-6) / 2, 1e6))
            self._checked = step, now
            reply = struct.pack("<?q", left <= 0, step + max(1, ahead))
        due, self._next_check = struct.unpack("<?q", self._comm.broadcast(reply, self._timeout))
        return bool(due)


def _cost(stats: SaveStats) -> float:
    return stats.stall_seconds + stats.waited_seconds
