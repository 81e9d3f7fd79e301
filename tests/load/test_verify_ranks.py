"""What is wrong on one rank after a load is an error on all ranks, and none waits for another."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent
CONTENTS = "other contents now than in the checkpoint, float32"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each case raised on rank 0 and on rank 1: class and words."""
    folder = tmp_path_factory.mktemp("ranks")
    job = run_ranks(2, HERE / "verify_job.py", folder)
    assert job.returncode == 0, job.stdout[-8000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("write_past_the_counter", f"model.0.weight: {CONTENTS} of shape (10, 6), sharded"),
        ("take_other_memory", f"model.0.weight: {CONTENTS} of shape (10, 6), sharded"),
        ("write_to_a_moment", f"optimizer.state.model.1.bias.momentum_buffer: {CONTENTS}"),
        ("forget_nested_state", "optimizer.state.model.1.weight.past.0: float32 of shape (7, 10) in the checkpoint"),
        ("raise_when_asked_again", "held: state_dict() of holders.Changing raised RuntimeError: no answer"),
        ("whole_copies", "the state 'momentum_buffer' of a sharded parameter of shape (10, 6) is a plain Tensor"),
    ],
)
def test_what_is_wrong_on_one_rank_of_a_sharded_state_is_an_error_on_all(found, case, words):
    for rank, cases in enumerate(found):
        kind, message = cases[case]
        assert kind == "RestoreDifferenceError", f"rank {rank}: {message}"
        assert words in message
        assert message.count("rank 1: ") == 1


def test_a_sharded_state_that_is_right_on_both_ranks_is_no_error(found):
    assert [cases["nothing_wrong"] for cases in found] == [["", ""]] * 2


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("own_bytes", f"own.list.0: {CONTENTS} of shape (3, 2), per_rank"),
        ("own_value", "own.list.1: 2 in the checkpoint, 3 now"),
        ("own_leaf_is_gone", "own.deep.x: float32 of shape (1,) in the checkpoint, nothing now"),
        ("own_leaf_too_many", "own.more: not in the checkpoint, here now"),
        ("own_container", "own.list: a list in the checkpoint, a tuple now"),
        ("own_order", "own: the order of the keys is not that of the checkpoint, which began with list, deep"),
        ("own_is_the_other_ranks", "own.list.0: float32 of shape (3, 2) in the checkpoint, nothing now"),
    ],
)
def test_what_each_rank_has_in_a_structure_of_its_own_is_looked_at_too(found, case, words):
    for rank, cases in enumerate(found):
        kind, message = cases[case]
        assert kind == "RestoreDifferenceError", f"rank {rank}: {message}"
        assert words in message
        assert message.count("rank 1: ") == 1
        assert "window: " not in message or case == "own_is_the_other_ranks", "that is rank 0's"


def test_ranks_with_structures_of_their_own_get_them_back(found):
    assert [cases["own_is_right"] for cases in found] == [["", ""]] * 2
