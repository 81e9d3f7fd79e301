from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptengine.data.described import order_from
from ckptengine.data.lanes import Lanes, pack_counts, unpack_counts

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def relaxed(examples: int) -> settings:
    """So many examples, however busy the machine is."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def lane_orders(draw: st.DrawFn) -> Lanes:
    block = draw(st.integers(1, 40))
    lanes = draw(st.integers(1, block))
    return Lanes(draw(COUNTS), block=block, lanes=lanes, seed=draw(st.integers(0, 3)), shuffle=draw(st.booleans()))


def every(order: Lanes) -> np.ndarray:
    return np.arange(order.length, dtype=np.int64)


@given(lane_orders(), st.integers(0, 5))
@relaxed(100)
def test_an_epoch_has_each_record_exactly_once(order: Lanes, epoch: int) -> None:
    assert np.array_equal(np.sort(order.at(epoch, every(order))), every(order))


@given(lane_orders(), st.integers(0, 5))
@relaxed(100)
def test_each_lane_reads_its_files_from_front_to_back_and_none_twice(order: Lanes, epoch: int) -> None:
    lanes, files, records = order.places(epoch, every(order))
    share = -(-order.length // order.lanes)
    for lane in range(order.lanes):
        mine = lanes == lane
        # A lane is one piece of the sequence of files: in each file the records follow each other.
        turns = np.flatnonzero(np.diff(files[mine], prepend=-1))
        assert len(set(files[mine][turns])) == len(turns)
        for piece in np.split(records[mine], turns[1:]):
            assert np.all(np.diff(piece) == 1)
        # Equal lengths, but for one share of a round and of the rest.
        assert abs(int(mine.sum()) - share) <= order.length // order.block + 2


@given(COUNTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@relaxed(100)
def test_a_rank_reads_only_its_own_lanes_where_the_ranks_divide_them(
    counts: list[int], ranks: int, lanes_each: int, slots: int
) -> None:
    lanes = ranks * lanes_each
    order = Lanes(counts, block=lanes * slots, lanes=lanes)
    positions = every(order)[: order.length // order.block * order.block]
    rank = positions % order.block * ranks // order.block
    assert np.array_equal(order.places(0, positions)[0] // lanes_each, rank)


def test_files_come_in_another_order_in_each_epoch_and_with_each_seed() -> None:
    orders = {
        (seed, epoch): tuple(Lanes([1] * 50, block=5, lanes=1, seed=seed).at(epoch, np.arange(50)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    unshuffled = Lanes([1] * 50, block=5, lanes=1, shuffle=False)
    assert unshuffled.at(4, np.arange(50)).tolist() == list(range(50))


def test_the_order_is_the_one_that_stored_positions_mean() -> None:
    # Checkpoints of released versions hold positions in this order: it must never change.
    order = Lanes([3, 0, 5, 2], block=4, lanes=2, seed=7)
    assert order.at(0, every(order)).tolist() == [3, 4, 0, 1, 5, 6, 2, 8, 7, 9]
    assert order.at(1, every(order)).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]


@given(lane_orders(), st.integers(0, 5))
@relaxed(100)
def test_an_order_is_made_anew_from_its_description(order: Lanes, epoch: int) -> None:
    again = order_from(order.describe())
    assert again.describe() == order.describe()
    assert np.array_equal(again.at(epoch, every(order)), order.at(epoch, every(order)))


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [[1, 1 << 40]]},
        {"counts": [[1 << 70, 2]]},
        {"counts": [[-1, 1]]},
        {"counts": [1, 2]},
        {"counts": "12"},
        {"counts": []},
        {"length": 11},
        {"lanes": 0},
        {"lanes": 5},
        {"block": 1 << 40},
        {"seed": -1},
        {"more": 1},
    ],
)
def test_a_forged_description_is_refused_at_once(change: dict[str, object]) -> None:
    good = Lanes([3, 0, 5, 2], block=4, lanes=2, seed=7).describe()
    order_from(good)
    with pytest.raises(ValueError):
        order_from({**good, **change})


def test_no_memory_is_needed_for_each_record() -> None:
    order = Lanes([1 << 40] * 1000, block=4096, lanes=64)
    samples = order.at(3, np.arange(order.length - 1000, order.length))
    assert len(set(samples.tolist())) == 1000
    assert samples.min() >= 0
    assert samples.max() < order.length


@pytest.mark.parametrize("positions", [np.array([-1]), np.array([10]), np.array([0.0]), np.array([[0]])])
def test_positions_outside_of_the_epoch_are_refused(positions: np.ndarray) -> None:
    with pytest.raises(ValueError, match="positions"):
        Lanes([3, 0, 5, 2], block=4, lanes=2).at(0, positions)


@given(st.lists(st.integers(0, 5), min_size=1))
@relaxed(30)
def test_packed_counts_are_the_same_counts(counts: list[int]) -> None:
    assert unpack_counts(pack_counts(counts)) == counts


def test_equal_shards_are_described_in_a_few_bytes() -> None:
    assert pack_counts([1000] * 100_000) == [[1000, 100_000]]
