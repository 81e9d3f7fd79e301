"""DeepSpeed's ZeRO stages: killed under one, resumed under another, at another number of ranks, and without DeepSpeed.

`make test-deepspeed` has an environment of its own for it: Accelerate and others change what they do where it is there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
sys.path.insert(0, str(Path(__file__).parents[1] / "parallelism"))

from ranks import run_ranks
from split_lives import live, worst

JOB = Path(__file__).parents[1] / "parallelism/deepspeed_cells_job.py"
CPU = {"DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "error"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_and_resumed_every_loss_is_equal_bit_for_bit(tmp_path: Path, stage: int) -> None:
    mode = f"deepspeed-{stage}"
    alone = live(tmp_path / "alone", [(mode, 2, 0)], **CPU)
    killed = live(tmp_path / "killed", [(mode, 2, 5), (mode, 2, 0)], **CPU)
    assert all(times == alone[step] * len(times) for step, times in killed.items())


def test_from_stage_3_at_3_ranks_over_1_and_2_losses_are_equal_to_the_order_of_sums(tmp_path: Path) -> None:
    alone = live(tmp_path / "alone", [("deepspeed-1", 1, 0)], **CPU)
    lives = [("deepspeed-3", 3, 4), ("deepspeed-1", 2, 7), ("deepspeed-2", 1, 9), ("deepspeed-3", 2, 0)]
    assert worst(live(tmp_path / "changed", lives, **CPU), alone) < 1e-5


def test_a_plain_model_and_optimizer_go_on_and_an_engine_after_them(tmp_path: Path) -> None:
    alone = live(tmp_path / "alone", [("plain", 1, 0)])
    lives = [("deepspeed-2", 2, 4), ("plain", 1, 7), ("deepspeed-3", 2, 0)]
    assert worst(live(tmp_path / "left", lives, **CPU), alone) < 1e-5


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("options")
    job = run_ranks(2, Path(__file__).parent / "deepspeed_options_job.py", folder, env=CPU)
    assert job.returncode == 0, job.stdout[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "case",
    [
        "round robin",  # ZeRO 2 has parameters in another order than that in which DeepSpeed says where they are
        "frozen",  # ZeRO 3 cuts what it does not train, too
        "hpz",  # ZeRO 3 keeps secondary parts of the weights, to compute with
    ],
)
def test_what_is_stored_and_restored_is_what_the_module_computes_with(case: str, options: list[dict[str, Any]]) -> None:
    assert [told[case] for told in options] == [[], []]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_are_made_of_the_restored_master_weights_when_the_model_alone_is_restored(
    tmp_path: Path, stage: int
) -> None:
    done = run_ranks(2, Path(__file__).parent / "deepspeed_job.py", tmp_path, stage, env=CPU)
    assert done.returncode == 0, done.stdout[-6000:]
    for rank in range(2):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert told["found"] == told["expected"] != told["before"]
        assert told["scale"] == 4.0
        assert "keeps odd, which is no plain value" in told["odd"]
        assert "LoadMismatchError" in told["other"]
        assert "the loss scaler of the checkpoint is another one" in told["other"]


@pytest.mark.timeout(650)
def test_engines_take_what_other_splits_have_saved_and_these_take_theirs(tmp_path: Path) -> None:
    job = run_ranks(4, JOB, tmp_path, env=CPU, timeout=600)
    assert job.returncode == 0, job.stdout[-6000:]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert found == [{}] * 4
