"""A script that was written for torch's distributed checkpoint, with another import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

import ckptengine as ce

SCRIPT = Path(__file__).parent / "training_job.py"


def run(ranks: int, folder: Path, action: str, place: Path, module: str = "ckptengine.dcp") -> str:
    job = run_ranks(ranks, SCRIPT, module, action, place, folder, timeout=200)
    assert job.returncode == 0, job.stdout[-8000:]
    return json.loads((folder / f"{action}.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    return run(1, folder, "whole", folder / "none")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1), (2, 2)])
def test_it_goes_on_bit_for_bit_at_any_number_of_ranks(before: int, after: int, tmp_path: Path, unbroken: str) -> None:
    assert run(before, tmp_path, "save", tmp_path / "checkpoint") == unbroken
    assert run(after, tmp_path, "load", tmp_path / "checkpoint") == unbroken


def test_it_goes_on_bit_for_bit_from_an_asynchronous_save(tmp_path: Path, unbroken: str) -> None:
    assert run(2, tmp_path, "async_save", tmp_path / "checkpoint") == unbroken
    assert run(2, tmp_path, "load", tmp_path / "checkpoint") == unbroken


def test_the_same_script_over_torchs_own_ends_with_the_same_bits(tmp_path: Path, unbroken: str) -> None:
    module = "torch.distributed.checkpoint"
    assert run(2, tmp_path, "save", tmp_path / "checkpoint", module) == unbroken
    assert run(2, tmp_path, "load", tmp_path / "checkpoint", module) == unbroken


def test_its_checkpoint_is_one_of_this_engine(tmp_path: Path) -> None:
    run(2, tmp_path, "save", tmp_path / "checkpoint")
    loaded = ce.load(tmp_path / "checkpoint")
    assert loaded["step"] == 3
    assert loaded["app"]["model"]["0.weight"].shape == (7, 4)
    assert loaded["app"]["optim"]["param_groups"][0]["lr"] == 0.1
