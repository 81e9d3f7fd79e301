"""Ranks that agree on their last call while some keep the interpreter's lock, in every order that a seed draws."""

import pytest
from rehearsal import Rehearsal
from rehearsed_job import FAILS, LOCKED, MIXED, Job, take_over

from ckptengine.comm import keyvalue
from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.policy import agreement
from ckptengine.policy.agreement import Agreement, Limit, Verdict


def rehearsed(seed, kind, monkeypatch, **plan):
    """Return a job that has run."""
    job = Job(seed, kind)
    vars(job).update(plan)
    with monkeypatch.context() as patch:
        take_over(job, patch)
        job.run()
    return job


@pytest.mark.parametrize("kind", [LOCKED, MIXED])
def test_all_ranks_end_at_the_same_call_or_none_does_whoever_keeps_the_lock_while_it_waits(kind, monkeypatch):
    ended = set()
    for seed in range(150):
        job = rehearsed(seed, kind, monkeypatch)
        assert len(set(job.ended.values())) == 1, f"seed {seed}: {job.ended}"
        assert len(set(job.stopped.values())) <= 1, f"seed {seed}: {job.stopped}"
        ended |= set(job.ended.values())
    assert ended == {"stopped", "finished"}


def test_no_rank_goes_past_the_call_at_which_another_ends_nor_waits_for_ever_whatever_fails(monkeypatch):
    for seed in range(300):
        job = rehearsed(seed, FAILS, monkeypatch)
        assert len(set(job.stopped.values())) <= 1, f"seed {seed}: {job.stopped}"
        assert max(job.passed) < min(job.stopped.values(), default=job.calls + 1), f"seed {seed}: {job.passed}"
        assert job.longest < 60, f"seed {seed}: {job.longest} s in one call"


def test_a_notice_that_can_not_be_passed_on_after_the_ranks_have_agreed_ends_no_rank(monkeypatch):
    for seed in range(30):
        plan = {
            "told": {0: 3.0, 1: 3.0},
            "told_late": {1},
            "faults": {1: (5, 5, False, False)},
        }  # which tells the others
        job = rehearsed(seed, MIXED, monkeypatch, size=2, pace=2.0, waits={}, **plan)
        assert job.ended == {0: "stopped", 1: "stopped"}, f"seed {seed}: {job.ended}"


def test_who_gives_up_on_rank_0_says_so_in_its_place_and_a_rank_0_that_was_late_goes_by_it(monkeypatch):
    rehearsal = Rehearsal(0)
    for module in (agreement, keyvalue):
        monkeypatch.setattr(module, "threading", rehearsal.threads)
        monkeypatch.setattr(module, "time", rehearsal.clock)
    store = MemoryStore()
    ranks = [Agreement(store, rank, 2, "life", 30) for rank in range(2)]
    verdicts = {}

    def other():
        ranks[1].publish(Limit(4), 0)
        verdicts[1] = ranks[1].hear(0)

    def late():
        rehearsal.sleep(100)
        ranks[0].publish(Limit(4), 0)
        verdicts[0] = ranks[0].decide(0)

    rehearsal.start(0, late)
    rehearsal.start(1, other)
    rehearsal.run(1000)
    assert verdicts == dict.fromkeys(range(2), Verdict("failed", why="rank 0 did not answer"))
