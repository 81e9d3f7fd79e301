"""The Trainer of Transformers: killed in mid-epoch and started again, it ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_job as job
from lives import KILLED, life


def run(place: Path, name: str, settings: dict[str, Any], code: int = 0) -> str:
    """Run a life of the job `name` and return what it has printed."""
    log = place / f"{name}.log"
    ended = life(lambda: job.train(place / name, place / f"{name}.out", settings), log)
    text = log.read_text()
    assert ended == code, text
    return text


def result(place: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(place / f"{name}.out-{rank}.pt", weights_only=False)
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs by a bit."""
    tensors, others = one.pop("tensors"), other.pop("tensors")
    assert tensors.keys() == others.keys()
    assert any(name.startswith("optimizer") for name in tensors)
    wrong = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    wrong += ["random"] if not torch.equal(one.pop("random"), other.pop("random")) else []
    return wrong + [name for name in one if one[name] != other[name]]


def ends_alike(place: Path, settings: dict[str, Any], kills: Sequence[int]) -> None:
    """Run a job through, and once more with a SIGKILL at some steps, and compare."""
    run(place, "through", settings)
    for step in kills:
        run(place, "killed", settings | {"kill": step}, KILLED)
    run(place, "killed", settings)
    assert differing(result(place, "through"), result(place, "killed")) == []


def test_a_job_that_is_killed_in_three_epochs_ends_with_the_weights_losses_and_random_streams_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    """Dropout and random masks draw from one stream, of which the loader is a batch ahead; logs are every 3 steps."""
    ends_alike(tmp_path, {}, [6, 17, 25])


ACCUMULATION = {"gradient_accumulation_steps": 3, "save_steps": 3, "logging_steps": 2}
EDGES = {"save_steps": 11, "eval_strategy": "epoch", "logging_strategy": "epoch"}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}


@pytest.mark.parametrize(
    ("args", "kill"),
    [
        pytest.param(ACCUMULATION, 5, id="gradient-accumulation"),
        pytest.param({"train_sampling_strategy": "group_by_length"}, 17, id="grouped-by-length"),
        pytest.param({"accelerator_config": {"use_seedable_sampler": False}}, 17, id="torch's-own-random-sampler"),
        pytest.param(EDGES, 11, id="killed-between-an-epoch's-last-step-and-its-end"),
        pytest.param(EPOCHS, 17, id="saves-and-evaluations-at-the-ends-of-epochs"),
    ],
)
def test_so_it_does_with(tmp_path: Path, args: dict[str, Any], kill: int) -> None:
    ends_alike(tmp_path, {"args": args}, [kill])


def test_so_it_does_with_loader_workers_that_draw_nothing(tmp_path: Path) -> None:
    ends_alike(tmp_path, {"args": {"dataloader_num_workers": 1}, "masks": False}, [17])


def test_two_ranks_under_torchrun_are_killed_and_end_alike(tmp_path: Path) -> None:
    """In the second epoch, whose order Accelerate's loaders lose when they skip batches on several ranks."""

    def launch(name: str, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        command += [str(Path(job.__file__)), str(tmp_path / name), str(tmp_path / f"{name}.out"), json.dumps(settings)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)

    settings = {"args": {"save_steps": 2, "ddp_backend": "gloo"}}
    for name, more, code in [("through", {}, 0), ("killed", {"kill": 9, "rank": 1}, 1), ("killed", {}, 0)]:
        done = launch(name, settings | more)
        assert done.returncode == code, done.stdout + done.stderr
    for rank in range(2):
        assert differing(result(tmp_path, "through", rank), result(tmp_path, "killed", rank)) == []
