"""Orders: bijections that look random, need no memory per sample, and never change from version to version."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.data.described import order_from
from ckptengine.data.mix import mix64, mix64_array
from ckptengine.data.order import MAX_LENGTH, Sequential, Shuffled


def epoch_of(order: Shuffled, epoch: int) -> list[int]:
    return order.at(epoch, np.arange(order.length)).tolist()


def test_every_sample_comes_once_at_each_length_to_300() -> None:
    for length in range(1, 301):
        assert sorted(epoch_of(Shuffled(length, 7), length % 5)) == list(range(length)), length


@pytest.mark.parametrize("length", [65_536, 65_537, 999_983, 1 << 20])
def test_every_sample_comes_once_at_greater_lengths(length: int) -> None:
    samples = Shuffled(length, 3).at(1, np.arange(length))
    assert np.array_equal(np.sort(samples), np.arange(length))


@given(st.integers(1, MAX_LENGTH), st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.data())
def test_any_length_gives_different_samples_of_the_epoch_for_different_positions(
    length: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=30, unique=True))
    samples = Shuffled(length, seed).at(epoch, np.array(positions)).tolist()
    assert len(set(samples)) == len(positions)
    assert all(0 <= sample < length for sample in samples)


def test_a_position_gives_the_same_sample_in_whatever_batch_it_is_asked_for() -> None:
    order = Shuffled(1000, 1)
    whole = epoch_of(order, 2)
    assert [order.at(2, np.array([n])).item() for n in range(0, 1000, 17)] == whole[::17]
    epoch_of(order, 3)
    assert epoch_of(order, 2) == whole


def deviations(table: np.ndarray, expected: float, freedom: int) -> float:
    """Return by how many standard deviations chi square is off, over the cells that are possible."""
    chi = ((table - expected) ** 2 / expected).sum()
    return abs(chi - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("length", [3, 4, 5, 8, 16, 50, 260])
def test_positions_and_neighbours_are_as_those_of_random_orders(length: int) -> None:
    """Over 1200 epochs of 24 seeds: each sample at each position, each pair of neighbours, and from epoch to epoch."""
    trials, every = 1200, np.arange(length)
    at, beside, later = (np.zeros((length, length)) for _ in range(3))
    before = None
    for trial in range(trials):
        samples = Shuffled(length, trial // 50).at(trial % 50, every)
        at[every, samples] += 1
        beside[samples[:-1], samples[1:]] += 1
        if before is not None:
            later[before, samples] += 1
        before = samples
    assert deviations(at, trials / length, (length - 1) ** 2) < 5
    assert deviations(later, (trials - 1) / length, (length - 1) ** 2) < 5
    pairs = beside[~np.eye(length, dtype=bool)]
    assert deviations(pairs, trials / length, length * (length - 1) - 1) < 5
    assert beside.trace() == 0


def test_distant_samples_are_no_more_alike_than_by_chance() -> None:
    samples = Shuffled(1_000_000, 0).at(0, np.arange(100_000)).astype(float)
    for lag in (1, 2, 64, 1000, 1001):  # 1000 is what a row of the domain holds
        assert abs(np.corrcoef(samples[:-lag], samples[lag:])[0, 1]) < 0.02


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = [epoch_of(Shuffled(100, seed), epoch) for seed in range(5) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_is_the_same_in_every_version() -> None:
    """A checkpoint's cursor is a position: if these numbers changed, old runs would go on with other samples."""
    assert epoch_of(Shuffled(10, 0), 0) == [0, 3, 6, 8, 2, 5, 7, 9, 1, 4]
    found = Shuffled(10**12 + 39, 42).at(7, np.array([0, 1, 2, 10**12]))
    assert found.tolist() == [953800212718, 142093664434, 290782181860, 976934193808]


def test_sequential_is_the_samples_as_they_are_numbered() -> None:
    positions = np.array([4, 0, 2])
    samples = Sequential(5).at(3, positions)
    assert samples.tolist() == [4, 0, 2]
    samples[0] = 9
    assert positions[0] == 4


@pytest.mark.parametrize("order", [Sequential(12), Shuffled(12, 2**64 - 1)])
def test_a_description_makes_the_order_anew(order: Sequential | Shuffled) -> None:
    again = order_from(order.describe())
    assert type(again) is type(order)
    assert again.describe() == order.describe()
    assert again.at(1, np.arange(12)).tolist() == order.at(1, np.arange(12)).tolist()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"kind": "sorted", "length": 3}, "there are"),
        ({"length": 3}, "order of kind None"),
        ({"kind": "shuffled", "length": 3}, "is not made of"),
        ({"kind": "shuffled", "length": 0, "seed": 1}, "from 1 to 2"),
        ({"kind": "shuffled", "length": 3, "seed": -1}, "seed=-1"),
    ],
)
def test_what_describes_no_order_is_refused(description: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order_from(description)


@pytest.mark.parametrize("positions", [np.array([0, 5]), np.array([-1]), np.array([0.5]), np.zeros((1, 1), int)])
def test_positions_outside_of_the_epoch_are_refused(positions: np.ndarray) -> None:
    for order in (Sequential(5), Shuffled(5, 0)):
        with pytest.raises(ValueError, match="positions"):
            order.at(0, positions)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=9))
def test_the_hash_of_arrays_is_that_of_numbers(values: list[int]) -> None:
    assert mix64_array(np.array(values, np.uint64)).tolist() == [mix64(value) for value in values]


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of SplitMix64 from state 1234567, as its authors' C code gives them."""
    golden = 0x9E3779B97F4A7C15
    found = [mix64(1234567 + n * golden) for n in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
