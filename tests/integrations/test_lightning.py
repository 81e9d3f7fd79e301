"""Lightning's Trainer, killed and started again by the same command."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from forkserver import start_server
from jobs import run_job

JOB = Path(__file__).with_name("lightning_job.py")


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Have a process that forks jobs: Lightning's import takes seconds."""
    start_server("lightning.pytorch,torchmetrics,ckptengine.integrations.lightning")


def start(options: dict[str, Any]) -> set[int]:
    """Run the job on its ranks; return their exit codes."""
    return run_job(JOB, options, options.get("ranks", 1))[0]


def run(place: Path, options: dict[str, Any], kills: int = 0) -> dict[str, Any]:
    """Run the job to its end, `kills` times started again; return what it noted."""
    place.mkdir()
    given = {"run": f"{place}/run", "log": f"{place}/log", "end": f"{place}/end", "killed": f"{place}/killed"} | options
    for _ in range(kills):
        assert start(given) == {-signal.SIGKILL}
    assert start(given) == {0}
    return noted(place, options.get("ranks", 1))


def noted(place: Path, ranks: int) -> dict[str, Any]:
    """Return, per rank, each batch's samples and losses (the last time it was trained), each epoch's means, the end."""
    said: dict[str, Any] = {}
    for rank in range(ranks):
        lines = [json.loads(line) for line in (place / f"log.{rank}").read_text().splitlines()]
        epochs = [json.loads(line) for line in (place / f"log.epochs.{rank}").read_text().splitlines()]
        said[f"batches {rank}"] = {line[0]: line[1:] for line in lines}
        for line in lines:  # what was trained twice was the same both times
            assert said[f"batches {rank}"][line[0]] == line[1:]
        said[f"epochs {rank}"] = {epoch: seen for epoch, seen in epochs}
        said[f"end {rank}"] = json.loads((place / f"end.{rank}").read_text())
        said[f"start {rank}"] = said[f"end {rank}"].pop("start")
    return said


def killed_as_whole(tmp_path: Path, kill: int, start_step: int, **options: Any) -> None:
    """Check that a job killed at a batch ends as the one that ran through."""
    whole = run(tmp_path / "whole", options)
    again = run(tmp_path / "again", options | {"kill": kill, "committed": start_step}, kills=1)
    for rank in range(options.get("ranks", 1)):
        assert whole.pop(f"start {rank}") is None
        assert again.pop(f"start {rank}") == start_step
    assert again == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_killed_in_mid_epoch_ends_as_the_one_that_ran_through(tmp_path: Path, workers: int) -> None:
    killed_as_whole(tmp_path, kill=16, start_step=15, workers=workers, noise=True)


def test_a_save_after_an_epochs_last_batch_counts_that_epoch_as_done(tmp_path: Path) -> None:
    killed_as_whole(tmp_path, kill=11, start_step=10, resume={"every": 10}, trainer={"max_steps": 27})


def test_an_elastic_sampler_goes_on_and_its_samples_stand_in_the_audit(tmp_path: Path) -> None:
    killed_as_whole(tmp_path, kill=16, start_step=15, elastic=4, workers=2)


def test_ranks_of_ddp_that_are_killed_go_on(tmp_path: Path) -> None:
    killed_as_whole(tmp_path, kill=8, start_step=6, ranks=2, strategy="ddp")


def test_ranks_of_fsdp2_that_are_killed_go_on(tmp_path: Path) -> None:
    killed_as_whole(tmp_path, kill=8, start_step=6, ranks=2, strategy="fsdp2")
