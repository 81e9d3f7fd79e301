"""When a save is due, by clocks and costs that the tests give: nothing here sleeps."""

from __future__ import annotations

import logging
import math
import random

import pytest

import ckptengine as ce
from ckptengine.comm.single import SingleProcess
from ckptengine.policy.interval import optimal_interval
from ckptengine.policy.rules import Policy
from ckptengine.policy.schedule import Schedule
from ckptengine.save.handle import SaveStats

FIRST_COSTS = 4.0
"""How much slower the first save of a process is."""


def stats(stall: float, durable: float) -> SaveStats:
    return SaveStats(1, "run/step-00000001", 1, 0.0, stall, durable, durable)


class Training:
    """A training on a clock of its own, with saves of a given cost; it counts what is lost."""

    def __init__(self, every: object, cost: float, durable: float, pace: float = 1.0) -> None:
        self.now, self.step, self.pace = 0.0, 0, pace
        self.cost, self.durable = cost, durable
        self.rules, self.lost = Policy.of(every).save_rules, 0.0  # type: ignore[arg-type]
        self.saved = 0
        self.schedule = self.new_life()
        self.starts: list[float] = []

    def new_life(self) -> Schedule:
        self.first = True
        self.in_flight: tuple[float, float, int] | None = None
        return Schedule(self.rules, SingleProcess(), 1.0, clock=lambda: self.now)

    def advance(self) -> None:
        """Train a step, and save where that is due."""
        self.now += self.pace
        self.step += 1
        if self.in_flight is not None and self.now >= self.in_flight[0]:
            _, stall, self.saved = self.in_flight
            self.schedule.learn(stats(stall, self.durable))
            self.in_flight = None
        if self.schedule.due(self.step):
            assert self.in_flight is None, "a save falls due while one is in flight"
            stall = self.cost * (FIRST_COSTS if self.first else 1.0)
            self.first = False
            self.schedule.started()
            self.starts.append(self.now)
            self.now += stall
            self.lost += stall
            self.in_flight = self.now - stall + max(stall, self.durable), stall, self.step

    def fail(self) -> None:
        """Lose what is not saved, and begin a new life from what is."""
        self.lost += (self.step - self.saved) * self.pace
        self.step = self.saved
        self.schedule = self.new_life()


def settled(every: object, cost: float, durable: float, pace: float = 1.0) -> float:
    """Return the mean time between saves once the schedule has settled."""
    training = Training(every, cost, durable, pace)
    while len(training.starts) < 40:
        training.advance()
    return (training.starts[-1] - training.starts[19]) / 20


@pytest.mark.parametrize(
    ("every", "cost", "durable", "expected"),
    [
        ("auto", 2.0, 5.0, 200.0),  # one per cent
        ("auto", 0.01, 40.0, 50.0),  # no save before the last one is durable
        (ce.Auto(overhead=0.05), 2.0, 5.0, 40.0),
        (ce.Auto(mtbf="6h"), 10.0, 20.0, optimal_interval(10, 21600)),
        (ce.Auto(mtbf=21600, overhead=0.01), 10.0, 20.0, 1000.0),  # the bound asks for more than Young and Daly
        (ce.Auto(mtbf="1d", overhead=0.5), 10.0, 20.0, optimal_interval(10, 86400)),
    ],
)
def test_an_automatic_interval_follows_from_the_cost(
    every: object, cost: float, durable: float, expected: float
) -> None:
    assert settled(every, cost, durable, pace=0.5) == pytest.approx(expected, rel=0.05)


def test_the_first_save_comes_at_once_and_its_cost_does_not_count() -> None:
    training = Training("auto", 2.0, 5.0)
    while len(training.starts) < 4:
        training.advance()
    assert training.starts[0] == 1.0
    assert training.starts[1] < 300  # not the 800 that its cost asks for
    assert training.starts[3] - training.starts[2] == pytest.approx(200, rel=0.02)


def test_the_interval_follows_a_cost_that_changes_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    training = Training("auto", 1.0, 2.0)
    with caplog.at_level(logging.INFO, "ckptengine"):
        while len(training.starts) < 12:
            training.advance()
        assert training.starts[-1] - training.starts[-2] == pytest.approx(100, rel=0.02)
        training.cost = 1.1  # not worth a line
        while len(training.starts) < 24:
            training.advance()
        training.cost = 4.0
        while len(training.starts) < 36:
            training.advance()
    assert training.starts[-1] - training.starts[-2] == pytest.approx(400, rel=0.02)
    assert [record.getMessage() for record in caplog.records] == [
        "saving every 100 s: a save costs 1 s, and an overhead of at most 0.01 decides",
        "saving every 400 s: a save costs 4 s, and an overhead of at most 0.01 decides",
    ]


def test_a_first_save_that_fails_is_tried_again_after_a_minute() -> None:
    now = [0.0]
    schedule = Schedule([ce.Auto()], SingleProcess(), 1.0, clock=lambda: now[0])
    assert schedule.due(1)
    schedule.started()
    due = []
    for step in range(2, 100):
        now[0] += 1
        if step == 11:
            schedule.failed()
        if schedule.due(step):
            due.append(now[0])
            schedule.started()
    assert len(due) == 1
    assert 60 <= due[0] < 70


def test_one_slow_save_does_not_move_the_interval() -> None:
    now = [0.0]
    schedule = Schedule([ce.Auto()], SingleProcess(), 1.0, clock=lambda: now[0])
    for stall in (9.0, 1.0, 1.0, 1.0, 30.0, 1.0):
        schedule.learn(stats(stall, 2.0))
    schedule.started()
    now[0] = 99.0
    assert not schedule.due(1)
    now[0] = 101.0
    assert schedule.due(2)


@pytest.mark.parametrize(("cost", "mtbf"), [(10.0, 86400.0), (60.0, 3600.0), (300.0, 1800.0)])
def test_the_optimal_interval_loses_the_least_time(cost: float, mtbf: float) -> None:
    """Daly's own model of the time that a job takes, for exponential failures (his eq. 20, restarts free)."""

    def lost(work: float) -> float:
        return mtbf * math.expm1((work + cost) / mtbf) / work

    best = min(lost(optimal_interval(cost, mtbf) * 1.01**power) for power in range(-200, 200))
    assert lost(optimal_interval(cost, mtbf) - cost) <= 1.002 * best


def simulated(every: object, seed: int, cost: float, durable: float, mtbf: float) -> float:
    """Return the part of the time that is lost to saves and failures, over 250 failures."""
    chance = random.Random(seed)
    training = Training(every, cost, durable, pace=15.0)
    for _ in range(250):
        ends = training.now + chance.expovariate(1 / mtbf)
        while training.now < ends:
            training.advance()
        training.fail()
    return training.lost / training.now


@pytest.mark.parametrize(("cost", "durable", "mtbf"), [(5.0, 20.0, 6 * 3600.0), (30.0, 60.0, 3 * 3600.0)])
def test_under_random_failures_it_loses_little_more_than_the_best_fixed_interval(
    cost: float, durable: float, mtbf: float
) -> None:
    center = optimal_interval(cost, mtbf)
    fixed = [simulated(f"{center * factor:.0f}s", 1, cost, durable, mtbf) for factor in (0.4, 0.7, 1, 1.4, 2.5)]
    assert min(fixed[0], fixed[-1]) > 1.1 * min(fixed)  # the interval matters here
    auto = simulated(ce.Auto(mtbf=mtbf), 1, cost, durable, mtbf)
    # What it costs more is the measuring: a save at the beginning of every life.
    assert auto < 1.1 * min(fixed)
    print(f"lost: {auto:.4f}, the best fixed interval {min(fixed):.4f}")


@pytest.mark.parametrize(
    "arguments", [{"mtbf": 0}, {"mtbf": "soon"}, {"overhead": 0}, {"overhead": 1.0}, {"mtbf": True}]
)
def test_an_auto_that_makes_no_sense_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        ce.Auto(**arguments)  # type: ignore[arg-type]
