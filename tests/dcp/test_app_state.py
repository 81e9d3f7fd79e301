"""A `Checkpointer` takes the states of scripts for torch's DCP, and a later change to plain objects loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

JOB = Path(__file__).with_name("app_state_job.py")


@pytest.mark.parametrize("action", ["app", "app that has trained", "dicts", "objects"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_from_an_app_state_whatever_it_is_loaded_into(
    saved: Path, tmp_path: Path, action: str, ranks: int
) -> None:
    """FSDP2; averages over one and two ranks are the same bits in this job."""
    job = run_ranks(ranks, JOB, action, saved / "run", tmp_path)
    assert job.returncode == 0, job.stdout[-6000:]
    assert json.loads((tmp_path / f"{action}.json").read_text()) == json.loads((saved / "whole.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a job that saved on two ranks in its middle, with what it ended with."""
    folder = tmp_path_factory.mktemp("saved")
    job = run_ranks(2, JOB, "whole", folder / "run", folder)
    assert job.returncode == 0, job.stdout[-6000:]
    return folder
