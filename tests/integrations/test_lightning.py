"""Lightning's Trainer, killed and started again by the same command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from forkserver import fork, start_server

JOB = Path(__file__).with_name("lightning_job.py")


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Have a process that forks jobs: Lightning's import takes seconds."""
    start_server("lightning.pytorch,torchmetrics,ckptengine.integrations.lightning")


def start(options: dict[str, Any], timeout: float = 120) -> list[int]:
    """Run the job on its ranks; return their exit codes, and print what they say."""
    ranks = options.get("ranks", 1)
    common = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
                   "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    with tempfile.TemporaryFile("w+") as said, contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(
                fork(
                    [str(JOB), json.dumps(options)],
                    env=common if ranks == 1 else common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=said, stderr=subprocess.STDOUT,
                )
            )
            for rank in range(ranks)
        ]  # fmt: skip
        codes = [job.wait(timeout) for job in jobs]
        said.seek(0)
        print(said.read()[-6000:])
    return codes


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(place: Path, options: dict[str, Any], kills: int = 0) -> dict[str, Any]:
    """Run the job to its end, `kills` times started again; return what it noted."""
    place.mkdir()
    given = {"run": f"{place}/run", "log": f"{place}/log", "end": f"{place}/end", "killed": f"{place}/killed"} | options
    for _ in range(kills):
        assert set(start(given)) == {-signal.SIGKILL}
    assert set(start(given)) == {0}
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
