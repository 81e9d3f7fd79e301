"""Training an existing model further: its weights into another job, with a report of what fitted."""

import logging

import pytest
import torch
from torch import nn

import ckptengine as ce
from ckptengine.errors import CheckpointNotFoundError, LoadMismatchError, StateError


class Net(nn.Module):
    def __init__(self, classes, extra=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, classes)
        if extra:
            self.adapter = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


def job(classes, seed, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(seed)
    model = Net(classes, **options)
    steps = optimizer(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(steps, 2, gamma=0.5)
    return {"model": model, "optimizer": steps, "scheduler": scheduler, "epoch": 0}


def train(state, steps):
    for _ in range(steps):
        state["model"](torch.randn(5, 6)).square().mean().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["scheduler"].step()
    state["epoch"] += 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of ten classes, and its weights."""
    run = tmp_path_factory.mktemp("base") / "run"
    state = job(10, seed=1)
    train(state, 3)
    with ce.Checkpointer(run) as ckpt:
        ckpt.save(3, state)
    return run, {name: value.clone() for name, value in state["model"].state_dict().items()}


def test_a_warm_start_takes_the_weights_and_nothing_else(base, tmp_path):
    run, weights = base
    state = job(10, seed=2, optimizer=torch.optim.SGD)
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.restore(state) is None
        report = ckpt.warm_start(run, state)
    assert report.complete
    assert len(report.loaded) == len(weights)
    for name, value in state["model"].state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert not state["optimizer"].state
    assert state["optimizer"].param_groups[0]["lr"] == 0.1
    assert state["scheduler"].last_epoch == 0
    assert state["epoch"] == 0


def test_a_new_head_stays_as_it_is_and_the_report_is_a_table_that_says_so(base, tmp_path, caplog):
    run, weights = base
    state = job(4, seed=2, extra=True)
    before = {name: value.clone() for name, value in state["model"].state_dict().items()}
    with ce.Checkpointer(tmp_path / "run") as ckpt, caplog.at_level(logging.WARNING, "ckptengine"):
        report = ckpt.warm_start(run, state)
    for name, value in state["model"].state_dict().items():
        assert torch.equal(value, weights[name] if name.startswith("body.") else before[name]), name
    table = [line.split(maxsplit=2) for line in report.table().splitlines()]
    assert table[0] == ["outcome", "leaf", "reason"]
    assert ["loaded", "model", "7 leaves"] in table
    assert ["mismatched", "model.head.weight", "shape (4, 8) here, (10, 8) in the checkpoint"] in table
    assert report.missing == ("model.adapter.weight",)
    assert report.table() in caplog.text


def test_what_is_asked_for_is_taken_too(base, tmp_path):
    run, _ = base
    state = job(10, seed=2)
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        report = ckpt.warm_start(run, state, only=["model.body", "scheduler", "epoch"])
    assert report.complete
    assert (state["scheduler"].last_epoch, state["epoch"]) == (3, 1)
    assert not state["optimizer"].state


def test_a_renamed_model_is_taken_under_its_new_name(base, tmp_path):
    run, weights = base
    torch.manual_seed(3)
    state = {"teacher": {"net": Net(10)}, "student": nn.Linear(2, 2)}
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        report = ckpt.warm_start(run, state, rename={"model": "teacher.net"})
    assert torch.equal(state["teacher"]["net"].head.weight, weights["head.weight"])
    assert report.missing == ("student.weight", "student.bias")


def test_strict_raises_and_changes_nothing(base, tmp_path):
    run, _ = base
    state = job(4, seed=2)
    before = {name: value.clone() for name, value in state["model"].state_dict().items()}
    with ce.Checkpointer(tmp_path / "run") as ckpt, pytest.raises(LoadMismatchError, match=r"model\.head\.weight"):
        ckpt.warm_start(run, state, strict=True)
    for name, value in state["model"].state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_of_which_nothing_fits_is_an_error(base, tmp_path):
    run, _ = base
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(LoadMismatchError, match="nothing in the checkpoint matches the state"):
            ckpt.warm_start(run, {"net": nn.Linear(3, 3)})
        with pytest.raises(StateError, match="no modules"):
            ckpt.warm_start(run, {"epoch": 0})
        with pytest.raises(CheckpointNotFoundError):
            ckpt.warm_start(tmp_path / "nowhere", job(10, seed=2))


def test_a_run_that_has_trained_is_not_overwritten(base, tmp_path):
    run, _ = base
    state = job(10, seed=2)
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.warm_start(run, state)
        ckpt.save(1, state)
        with pytest.raises(StateError, match="restore"):
            ckpt.warm_start(run, state)
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.restore(state) == 1
        with pytest.raises(StateError, match="restore"):
            ckpt.warm_start(run, state)
