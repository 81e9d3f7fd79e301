import mmap
import threading

import numpy as np
import pytest
from native_tables import ScatterOp, block_crcs, native, random_bytes, table

BLOCK = 4096
SLOTS, RANKS = 2, 2


class Ranks:
    """A window for two ranks of this process, a file of 6 blocks, and where each rank wants it."""

    def __init__(self) -> None:
        self.file = random_bytes(1, 6 * BLOCK)
        self.crcs = block_crcs(self.file, BLOCK)
        size = native.window_control(SLOTS, RANKS) + SLOTS * BLOCK
        self.memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        self.targets = [np.zeros(6 * BLOCK, np.uint8) for _ in range(RANKS)]
        self.requests = np.array([[number, number * BLOCK, BLOCK] for number in range(6)], np.int64)

    def window(self, rank: int = 0, **changes: int) -> np.ndarray:
        row = {"address": self.memory.ctypes.data, "nbytes": self.memory.size, "slots": SLOTS}
        row |= {"slot_nbytes": BLOCK, "ranks": RANKS, "rank": rank, **changes}
        return np.array(list(row.values()), np.int64)

    def read(self, number: int, seconds: float = 0.0) -> int:
        """Put a request into its slot, if that is free."""
        consumers = np.arange(RANKS, dtype=np.int64)
        outcome = native.share_wait(self.window(), number, consumers, seconds)
        if outcome == native.READY:
            slot = native.window_control(SLOTS, RANKS) + number % SLOTS * BLOCK
            self.memory[slot : slot + BLOCK] = self.file[number * BLOCK : (number + 1) * BLOCK]
            native.share_publish(self.window(), number)
        return outcome

    def take(self, rank: int, seconds: float = 0.0, **changes: object) -> int:
        """Scatter all requests that are there."""
        flat, index = table([ScatterOp(0, (6 * BLOCK,), (0,), self.targets[rank]).row()])
        given = {"window": self.window(rank), "requests": self.requests, "fixed_nbytes": self.file.size}
        given |= {"block_nbytes": BLOCK, "block_crcs": self.crcs, "ops": flat, "index": index}
        return native.share_consume(**{**given, "threads": 1, "seconds": seconds, **changes})


def test_a_slot_is_free_only_when_every_consumer_is_done_with_it():
    ranks = Ranks()
    assert [ranks.read(number) for number in range(3)] == [native.READY, native.READY, native.LATE]
    assert ranks.take(0) == native.LATE
    assert ranks.read(2) == native.LATE
    assert ranks.take(1) == native.LATE
    assert ranks.read(2) == native.READY
    for target in ranks.targets:
        assert np.array_equal(target[: 2 * BLOCK], ranks.file[: 2 * BLOCK])
        assert not target[2 * BLOCK :].any()


def test_what_was_late_is_taken_by_the_same_call_again():
    ranks = Ranks()
    outcomes = []
    for number in range(6):
        assert ranks.read(number) == native.READY
        outcomes = [ranks.take(rank) for rank in range(RANKS)]
    assert outcomes == [native.READY] * RANKS
    assert all(np.array_equal(target, ranks.file) for target in ranks.targets)


def test_a_waiting_rank_goes_on_as_soon_as_there_is_something():
    ranks = Ranks()
    takers = [threading.Thread(target=ranks.take, args=(rank, 60.0)) for rank in range(RANKS)]
    for taker in takers:
        taker.start()
    assert [ranks.read(number, 60.0) for number in range(6)] == [native.READY] * 6
    for taker in takers:
        taker.join()
    assert all(np.array_equal(target, ranks.file) for target in ranks.targets)


def test_a_stopped_window_ends_waits_that_are_under_way_and_all_later_ones():
    ranks = Ranks()
    outcomes: list[int] = []
    waiter = threading.Thread(target=lambda: outcomes.append(ranks.take(0, 60.0)))
    waiter.start()
    native.share_stop(ranks.window(1))
    waiter.join()
    assert outcomes == [native.STOPPED]
    assert ranks.read(0, 60.0) == native.STOPPED


@pytest.mark.parametrize(
    "changes",
    [
        {"address": 0},
        {"address": 64},
        {"nbytes": 3 * BLOCK - 1},
        {"nbytes": -1},
        {"slots": 0},
        {"slots": 3},
        {"slots": 2**62},
        {"slot_nbytes": 0},
        {"slot_nbytes": BLOCK + 8},
        {"slot_nbytes": 2**62},
        {"ranks": 0},
        {"ranks": 2**62},
        {"rank": 2},
        {"rank": -1},
    ],
)
def test_a_window_that_does_not_fit_its_memory_is_refused(changes):
    ranks = Ranks()
    window = ranks.window(**changes)
    for call in (
        lambda: native.share_wait(window, 0, np.zeros(0, np.int64), 0.0),
        lambda: native.share_publish(window, 0),
        lambda: native.share_stop(window),
        lambda: ranks.take(0, window=window),
    ):
        with pytest.raises(ValueError, match="window"):
            call()
    assert not ranks.memory.any()


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([[0, 0, 2 * BLOCK]], "slot"),
        ([[1, 0, BLOCK], [1, BLOCK, BLOCK]], "order"),
        ([[-1, 0, BLOCK]], "order"),
        ([[2**63 - 1, 0, BLOCK]], "order"),
        ([[0, 5, BLOCK]], "block_nbytes"),
        ([[0, 6 * BLOCK, BLOCK]], "fixed region"),
        ([[0, 0, -BLOCK]], "fixed region"),
        ([0, 0], "rows of 3"),
    ],
)
def test_requests_out_of_bounds_are_refused(requests, message):
    with pytest.raises(ValueError, match=message):
        Ranks().take(0, requests=np.array(requests, np.int64))


def test_ranks_and_times_out_of_bounds_are_refused():
    ranks = Ranks()
    with pytest.raises(ValueError, match="rank 2 of 2"):
        native.share_wait(ranks.window(), 5, np.array([0, 2], np.int64), 0.0)
    with pytest.raises(ValueError, match="request -1"):
        native.share_publish(ranks.window(), -1)
    with pytest.raises(ValueError, match="seconds"):
        native.share_wait(ranks.window(), 5, np.zeros(0, np.int64), float("nan"))
    with pytest.raises(ValueError, match="window must hold"):
        native.share_stop(np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="slots"):
        native.window_control(0, 1)
