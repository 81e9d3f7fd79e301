"""What four ranks that declare how their tensors are split get: their parts, or an error that names what is wrong."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")
from split_jobs import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return launch("declare_job.py", 4, tmp_path_factory.mktemp("declare"))


def test_parts_of_uneven_lengths_none_included_come_back_in_other_lengths(found):
    whole = [[3.0 * row + column for column in range(3)] for row in range(6)]
    for rank, start in enumerate([0, 3, 4, 5]):
        assert found[rank]["uneven_and_empty_parts"] == [whole, whole[start : start + (1 if rank else 3)]]


def test_replicas_of_parts_are_stored_once(found):
    expected = [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert [one["replicas_that_are_equal"] for one in found] == [expected] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "replicas_that_differ",
            r"ReplicaMismatchError: .*v\.\[0:2, 0:3\]: the replicas on rank 2 differ from that of rank 0.*"
            r"v\.\[2:4, 0:3\]: the replicas on rank 3 differ from that of rank 1",
        ),
        ("nothing_declared", r"ReplicaMismatchError: .*w: .* how it is split with ckptengine\.Sharded\(model"),
        (
            "the_wrong_dimension",
            r"LoadMismatchError: .*w: shape \(2, 6\) here, \(4, 3\) in the checkpoint; rank \d has \(2, 3\), declared "
            r"as split along dimension 1 over ranks \d, \d: check dim",
        ),
        (
            "parts_that_were_forgotten",
            r"LoadMismatchError: .*w: parts of the lengths 16 along dimension 0 here, 8,8 in the checkpoint; rank \d",
        ),
        (
            "another_dimension_on_one_rank",
            r"StateError: .*the tensor: declared as split along dimension \d on rank [23], as split along",
        ),
        ("a_group_that_is_not_that_of_the_others", r"StateError: .*rank 1, which is in it, is itself in another one"),
        ("a_rank_that_lacks_the_tensor", r"StateError: .*declared on rank \d, not on rank \d of its group"),
        (
            "lengths_that_do_not_fit_each_other",
            r"StateError: .*shape \(2, \d\) on rank \d, \(2, \d\) on rank \d; of parts",
        ),
        ("a_pattern_that_fits_nowhere", r"StateError: .*'late' fits no tensor on any rank.*has early"),
        (
            "another_number_of_rules_on_some_ranks",
            r"StateError: .*different numbers of rules: 1 on ranks 0, 2, 2 on ranks 1, 3; give all ranks",
        ),
        ("no_rules_on_one_rank", r"(TypeError|RankFailedError: .*rank 2): Sharded: {} has no rules"),
        (
            "a_group_without_the_rank_that_gives_it",
            r"StateError: .*a group of ranks 0, 1, on rank 3 of 4; each rank passes the group that it is in itself",
        ),
        ("a_distributed_tensor", r"StateError: .*w: a .*DTensor is declared with ce\.Sharded.*says itself"),
        ("a_mesh_of_two_dimensions", r"StateError: .*a mesh of 2 dimensions .*mesh\['dp'\]"),
        ("means_over_a_split_dimension", r"StateError: .*optimizer\.state\..*col_var: .*another split could take over"),
    ],
)
def test_an_error_on_all_ranks_names_what_is_wrong_with(name, message, found):
    for one in found:
        assert re.search(message, str(one[name]), re.DOTALL), one[name]


def test_a_pattern_may_fit_on_some_ranks_only(found):
    assert [one["a_pattern_that_fits_on_one_rank_only"] for one in found] == [["early"]] * 3 + [["late"]]


def test_experts_that_are_split_themselves_become_distributed_tensors_of_any_placement_and_back(found):
    assert [one["a_stack_of_split_experts_and_distributed_tensors"] for one in found] == [[True] * 6] * 4


def test_means_over_the_matrices_of_a_stack_come_back(found):
    expected = {"step": [], "row_var": [8, 3, 1], "col_var": [8, 1, 5]}
    assert [one["means_inside_a_stack"] for one in found] == [expected] * 4


def test_what_is_each_rank_s_own_by_name_comes_back_with_its_moments(found):
    assert [one["each_rank_s_own_by_name"] for one in found] == [[True, True]] * 4
