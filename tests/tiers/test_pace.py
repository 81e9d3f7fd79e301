"""However it is asked, a pace lets no more pass than it says, and no less."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.tiers.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@given(
    st.floats(1, 1e10),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.floats(0, 100)), max_size=50),
)
def test_in_no_stretch_of_time_does_more_pass_than_the_rate_and_a_seconds_worth(rate, steps):
    clock = Clock()
    pace = Pace(rate, clock=lambda: clock.now, sleep=clock.sleep)
    passed = [(0.0, 0)]
    for nbytes, idle in steps:
        clock.now += idle
        pace.take(nbytes)
        passed.append((clock.now, passed[-1][1] + nbytes))
    for number, (begin, before) in enumerate(passed):
        for end, after in passed[number + 1 :]:
            assert after - before <= rate * (end - begin + 1) * (1 + 1e-6) + 1


@given(st.integers(1, 1 << 30), st.lists(st.integers(1, 1 << 20), min_size=1, max_size=50))
def test_who_is_always_ready_gets_the_whole_rate(rate, sizes):
    clock = Clock()
    pace = Pace(rate, clock=lambda: clock.now, sleep=clock.sleep)
    for nbytes in sizes:
        pace.take(nbytes)
    assert clock.now == pytest.approx(sum(sizes) / rate)


def test_time_that_a_transfer_takes_by_itself_is_not_waited_for_again():
    clock = Clock()
    pace = Pace(100, clock=lambda: clock.now, sleep=clock.sleep)
    for _ in range(20):
        pace.take(50)
        clock.now += 0.4
    assert clock.now == pytest.approx(10, rel=0.05)


def test_threads_share_one_rate():
    clock, lock, asked = Clock(), threading.Lock(), []

    def sleep(seconds: float) -> None:
        with lock:
            asked.append(seconds)

    pace = Pace(1000, clock=lambda: clock.now, sleep=sleep)
    threads = [threading.Thread(target=lambda: [pace.take(10) for _ in range(100)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(asked) == pytest.approx(8.0), "800 takes of 10 bytes at 1000 bytes per second"
    assert len(set(map(round, [one * 1000 for one in asked]))) == 800, "no two pass at the same time"


def test_what_sleep_raises_ends_the_wait():
    def stop(seconds: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Pace(1, sleep=stop).take(10)


def test_a_rate_of_nothing_is_refused():
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="bytes_per_second"):
            Pace(rate)
