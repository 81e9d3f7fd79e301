from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment, launch

JOB = str(Path(__file__).with_name("loader_job.py"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[dict]]:
    """What two ranks found that saved in mid-epoch, and what three processes found that were started afterwards."""
    folder = tmp_path_factory.mktemp("loader")
    return launch(JOB, 2, folder, "save"), launch(JOB, 3, folder, "resume")


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_stateful_loader_goes_on_with_exactly_the_batches_that_training_had_not_had(
    jobs: tuple[list[dict], list[dict]], kind: str
) -> None:
    saved, resumed = jobs
    for rank in range(2):
        whole = saved[rank]["two"][kind]
        assert len(whole["before"]) == 5
        assert len(whole["after"]) >= 8
        assert resumed[rank]["two"][kind] == whole["after"]
    assert saved[0]["two"][kind]["before"] != saved[1]["two"][kind]["before"]


def test_another_number_of_ranks_is_told_what_to_use_instead(jobs: tuple[list[dict], list[dict]]) -> None:
    for rank in jobs[1]:
        message = rank["three"]
        assert "map: the position of a StatefulDataLoader on one of 2 ranks, 3 ranks here" in message
        assert "iterable: the position" in message
        assert "ElasticSampler or ElasticBatches" in message


def test_another_number_of_workers_is_refused_when_it_is_loaded(jobs: tuple[list[dict], list[dict]]) -> None:
    for rank in jobs[1][:2]:
        assert "StatefulDataLoader with num_workers=0 here, 2 in the checkpoint" in rank["workers"]
        assert "num_workers=2" in rank["workers"]


def test_the_engine_needs_no_torchdata() -> None:
    code = (
        "import sys, ckptengine as ce; ce.ElasticBatches;"
        "sys.exit(any(name.split('.')[0] in ('torch', 'torchdata') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0
