"""Layers that are split by hand, as Megatron's column and row parallel ones are, on 2, 4 and 1 ranks."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from split_jobs import launch

import ckptengine as ce


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("tensor")
    return folder, launch("tensor_job.py", 4, folder)


@pytest.mark.parametrize(("size", "name"), [(4, "four"), (1, "back to one")])
def test_each_rank_gets_its_parts_of_weights_and_moments_to_the_bit(trained, size, name):
    assert [trained[1][rank][f"{name} wrong"] for rank in range(size)] == [[]] * size


@pytest.mark.parametrize(("size", "name"), [(4, "four"), (1, "back to one")])
def test_training_goes_on_with_the_losses_of_the_run_that_was_never_split(trained, size, name):
    _, ranks = trained
    expected = ranks[0]["reference"]
    np.testing.assert_allclose(ranks[0]["two"], expected[:3], rtol=1e-4)
    for rank in range(size):
        np.testing.assert_allclose(ranks[rank][name], expected[3:], rtol=1e-4)


@pytest.mark.parametrize(("how", "size"), [("fsdp1", 2), ("zero", 3)])
def test_training_goes_on_shared_by_other_means_and_split_by_hand_again(trained, how, size):
    _, ranks = trained
    for rank in range(size):
        np.testing.assert_allclose(ranks[rank][how], ranks[0]["reference"][3:], rtol=1e-4)
    assert [ranks[rank][f"by hand after {how} wrong"] for rank in range(2)] == [[]] * 2


def test_the_checkpoint_is_that_of_a_model_that_is_not_split(trained):
    folder, _ = trained
    whole, split = (ce.load(folder / name) for name in ("reference", "two"))
    assert list(split["model"]) == list(whole["model"])
    for name, array in whole["model"].items():
        assert split["model"][name].shape == array.shape
    state = split["optimizer"]["state"]
    assert {name: one["exp_avg"].shape for name, one in state.items()} == {
        name: one["exp_avg"].shape for name, one in whole["optimizer"]["state"].items()
    }
    assert all(one["step"] == 3 and one["step"].shape == () for one in state.values())


def test_a_second_save_is_the_same(trained):
    folder, _ = trained
    first, again = (ce.load(folder / name)["model"] for name in ("two", "again"))
    assert all(np.array_equal(first[name], again[name]) for name in first)
