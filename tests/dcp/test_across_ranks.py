"""Torch's distributed checkpoint over this engine, on four ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).parent / "scenarios_job.py"
NAMES = (
    "sharded_in_one_way_and_loaded_in_another",
    "a_group_that_is_a_part_of_the_job",
    "values_that_only_one_rank_has",
    "values_that_differ_between_ranks_are_told",
    "sharded_tensors_of_the_old_kind",
    "plans_that_are_kept_between_saves",
    "plans_of_which_one_rank_s_has_changed",
    "plans_that_are_kept_after_a_failed_save",
    "a_planner_of_ones_own",
    "without_collectives",
    "a_mesh_whose_ranks_do_not_ascend",
    "one_rank_fails_and_the_checkpoint_before_stays",
    "asynchronously_in_a_process_of_its_own",
    "a_checkpoint_of_the_engines_own_calls",
    "ranks_that_see_different_checkpoints",
    "bytes_of_a_planner_that_hold_code",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("dcp")
    job = run_ranks(4, SCRIPT, folder, timeout=280)
    assert job.returncode == 0, job.stdout[-8000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_it_holds(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert name in outcome, f"rank {rank} did not come to it: {next(filter(None, outcome.values()), '')}"
        assert not outcome[name], f"rank {rank}: {outcome[name]}"


def test_every_scenario_is_looked_at(outcomes: list[dict[str, str]]) -> None:
    assert tuple(outcomes[0]) == NAMES
