"""Random streams of three real ranks, loaded by three, two, four and one."""

import pytest
from launch import launch

pytest.importorskip("torch")

SHARED, OWN = ("torch.cpu", "common"), ("python", "numpy", "own")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("rng_job.py", 4, tmp_path_factory.mktemp("rng"))


def drawn(ranks, phase):
    return [rank[phase] for rank in ranks if phase in rank]


def test_at_the_same_world_size_each_rank_draws_on_bit_for_bit(ranks):
    assert drawn(ranks, "three") == drawn(ranks, "saved")
    assert len(drawn(ranks, "three")) == 3


@pytest.mark.parametrize("size", [2, 4])
def test_at_another_world_size_own_streams_begin_anew_and_shared_ones_go_on(ranks, size):
    before, after = drawn(ranks, "saved"), drawn(ranks, f"on {size}")
    assert len(after) == size
    for name in OWN:
        numbers = [number for rank in before + after for number in rank[name]]
        assert len(set(numbers)) == len(numbers), "each rank's stream is another one, and none that was saved"
    for name in SHARED:
        assert all(rank[name] == before[0][name] for rank in after)


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_checkpoint_gives_the_same_streams_whenever_it_is_loaded(ranks, size):
    assert drawn(ranks, f"on {size}") == drawn(ranks, f"again on {size}")


def test_ranks_with_the_same_key_draw_the_same_and_others_differ(ranks):
    keyed = drawn(ranks, "keyed")
    assert keyed[0] == keyed[1]
    assert keyed[2] == keyed[3]
    assert all(keyed[0][name] != keyed[2][name] for name in OWN)
    assert all(keyed[0][name] == keyed[2][name] for name in SHARED)


def test_what_ranks_shared_is_shared_again_after_a_time_as_one_rank(ranks):
    one, two = drawn(ranks, "one"), drawn(ranks, "two of one")
    assert len(one) == 1
    for name in SHARED:
        assert [rank[name] for rank in two] == [one[0][name]] * 2 == [ranks[0]["saved"][name]] * 2
    for name in OWN:
        assert len({str(rank[name]) for rank in one + two}) == 3


def test_a_job_of_one_rank_has_only_streams_of_its_own(ranks):
    alone, two = drawn(ranks, "alone"), drawn(ranks, "two of alone")
    for name in SHARED + OWN:
        assert len({str(rank[name]) for rank in alone + two}) == 3


def test_streams_that_are_said_to_be_shared_and_are_not_fail_the_save(ranks):
    for rank in ranks[:3]:
        assert "rng.shared.python: not rank 0's on ranks 1, 2" in rank["refused"]
