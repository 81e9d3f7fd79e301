"""How ranks agree on the call at which all end, where some can't answer in time."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.policy.agreement import Agreement, Limit, Verdict


@pytest.fixture
def ranks():
    store = MemoryStore()
    return [Agreement(store, rank, 3, "life", 30) for rank in range(3)]


def test_all_go_by_the_greatest_limit(ranks):
    for rank, call in zip(ranks, (4, 6, 5), strict=True):
        rank.publish(Limit(call), 0)
    assert [ranks[0].decide(0), ranks[1].hear(0), ranks[2].hear(0)] == [Verdict("stop", 6)] * 3


def test_a_rank_that_is_held_back_for_too_long_goes_on_and_all_agree_in_the_next_turn(ranks):
    for rank, call in zip(ranks[:2], (4, 6), strict=True):
        rank.publish(Limit(call), 0)  # the third can't: it waits for the second
    assert ranks[1].give_way(0) is None
    ranks[2].publish(Limit(5), 0)
    assert [ranks[0].decide(0), ranks[2].hear(0)] == [None, None]
    with ThreadPoolExecutor(1) as pool:
        ranks[1].publish(Limit(8), 1)
        deciding = pool.submit(ranks[0].decide, 1)  # limits of the turn before don't count
        ranks[2].publish(Limit(7), 1)
        ranks[0].publish(Limit(7), 1)
        assert deciding.result(30) == Verdict("stop", 8)
    assert ranks[2].hear(1) == Verdict("stop", 8)


def test_a_rank_that_gives_way_when_the_verdict_is_there_goes_by_it(ranks):
    for rank in ranks:
        rank.publish(Limit(4), 0)
    ranks[0].decide(0)
    assert ranks[1].give_way(0) == Verdict("stop", 4)


def test_a_rank_that_is_gone_is_so_in_every_turn(ranks):
    ranks[2].publish(Limit(0, gone="closed"))
    ranks[2].publish(Limit(9), 0)  # by a thread that has yet to hear of it
    for rank in ranks[:2]:
        rank.publish(Limit(4), 3)
    assert ranks[0].decide(3) == Verdict("over")


def test_later_turns_hold_ranks_back_for_longer_and_let_training_go_on_for_longer_to_a_bound(ranks):
    held = [round(ranks[0].patience(turn) / ranks[0].patience(0)) for turn in (0, 1, 2, 3, 8, 9, 50)]
    between = [round(ranks[0].pause(turn) / ranks[0].pause(0)) for turn in (0, 1, 2, 3, 4, 5, 50)]
    assert held == [1, 1, 2, 2, 16, 16, 16]
    assert between == [1, 2, 4, 8, 16, 16, 16]
