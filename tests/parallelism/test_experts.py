"""Eight experts over 4, 2 and 8 ranks, and over two replicas of 4: declared as a stack or as lists, or as DTensors."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from split_jobs import die, launch

import ckptengine as ce

CHANGES = {"two from four": 2, "wide from two": 8, "replicas from wide": 8, "two from replicas": 2}


@pytest.fixture(scope="module", params=["stacked", "dtensor", "list"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("experts")
    return folder, launch("expert_job.py", 8, folder, request.param)


@pytest.mark.parametrize("change", CHANGES)
def test_each_rank_gets_its_experts_and_their_moments_to_the_bit(trained, change):
    assert [trained[1][rank][f"{change} wrong"] for rank in range(CHANGES[change])] == [[]] * CHANGES[change]


@pytest.mark.parametrize("change", CHANGES)
def test_training_goes_on_with_the_losses_of_the_run_that_did_not_change(trained, change):
    _, ranks = trained
    for rank in range(CHANGES[change]):
        np.testing.assert_allclose(ranks[rank][change], ranks[0]["reference"], rtol=1e-4)


def test_the_checkpoint_has_each_expert_once(trained):
    folder, _ = trained
    model = ce.load(folder / "replicas")["model"]
    if "layers.0.w_in" in model:
        experts = model["layers.0.w_in"]
    else:
        experts = np.stack([model.pop(f"layers.0.experts.{number}.0.weight") for number in range(8)])
        assert not [name for name in model if name.startswith("layers.0.experts.") and name.endswith(".0.weight")]
    assert experts.size == 8 * 32 * 48
    assert len(np.unique(experts)) > experts.size * 0.9


@pytest.mark.parametrize(
    ("kind", "ranks", "shape"), [("stacked", 2, (1, 2)), pytest.param("list", 8, (2, 4), marks=pytest.mark.long)]
)
def test_a_training_that_is_killed_goes_on_with_other_numbers_of_experts_on_a_rank(tmp_path, kind, ranks, shape):
    (tmp_path / "whole").mkdir()
    whole = launch("expert_life_job.py", 4, tmp_path / "whole", kind, "1", "4", "8", "0")[0]
    assert whole["start"] is None
    die("expert_life_job.py", 4, tmp_path, kind, "1", "4", "8", "5")
    for rank in launch("expert_life_job.py", ranks, tmp_path, kind, *map(str, shape), "8", "0"):
        assert rank["start"] == 4
        assert rank["wrong"] == []
        losses = [whole["losses"][step] for step in ("5", "6", "7", "8")]
        np.testing.assert_allclose([rank["losses"][step] for step in ("5", "6", "7", "8")], losses, rtol=1e-4)
