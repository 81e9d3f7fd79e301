"""Snapshots that are copied while training goes on: none is torn, whatever kind of optimizer steps next."""

import threading
import time

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.optim.optimizer import _global_optimizer_pre_hooks

import ckptengine as ce
from ckptengine.errors import DeadlineError, SaveFailedError
from ckptengine.snapshot.snapshotter import Snapshotter

PATIENCE = 60.0


class Net(torch.nn.Module):
    """Layers with BatchNorm, whose statistics change in forward."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 4)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


class SlowCopy:
    """Holds the copy in the background back until the optimizer has asked to step, and for a while longer."""

    def __init__(self, patch):
        self.asked, self.copied = threading.Event(), False
        fill = Snapshotter.bring

        def slow(snapshotter, *arguments):
            assert self.asked.wait(PATIENCE)
            time.sleep(0.1)
            fill(snapshotter, *arguments)
            self.copied = True

        patch.setattr(Snapshotter, "bring", slow)


def values_of(model, optimizer):
    """Return copies of all tensors by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{key}": value for key, value in state.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def train_step(model, step, batch):
    loss = functional.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))
    loss.backward()
    step()
    for parameter in model.parameters():
        parameter.grad = None


OPTIMIZERS = {
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "one by one": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False, fused=False),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_step_of_any_optimizer_waits_for_the_copy(tmp_path, monkeypatch, kind):
    torch.manual_seed(0)
    model, slow = Net(), SlowCopy(monkeypatch)
    optimizer = OPTIMIZERS[kind](model.parameters())
    batch = torch.randn(8, 16)
    train_step(model, optimizer.step, batch)
    state = {"model": model, "optimizer": optimizer}
    with ce.Checkpointer(tmp_path / "run", overlap=True) as checkpointer:
        expected = values_of(model, optimizer)
        handle = checkpointer.save(1, state)
        assert not handle.staged.done(), "parameters are copied in the background"
        before = model.norm.running_mean.clone()

        def step():
            slow.asked.set()
            optimizer.step()

        train_step(model, step, batch)
        assert slow.copied
        assert handle.staged.done()
        assert not torch.equal(model.norm.running_mean, before), "forward has changed a buffer meanwhile"
        handle.durable.result()
        assert any(not torch.equal(now, expected[name]) for name, now in values_of(model, optimizer).items())
        assert checkpointer.restore(state) == 1
        loaded = values_of(model, optimizer)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_compiled_step_waits_for_the_copy(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, slow = Net(), SlowCopy(monkeypatch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    compiled = torch.compile(optimizer.step, backend="eager")
    batch = torch.randn(8, 16)
    train_step(model, compiled, batch)
    state = {"model": model, "optimizer": optimizer}
    with ce.Checkpointer(tmp_path / "run", overlap=True) as checkpointer:
        for number in (1, 2):
            slow.asked.clear()
            expected = values_of(model, optimizer)
            handle = checkpointer.save(number, state)
            assert not handle.staged.done()
            threading.Timer(0.2, slow.asked.set).start()
            train_step(model, compiled, batch)
            handle.durable.result()
            changed = values_of(model, optimizer)
            assert not torch.equal(changed["model.first.weight"], expected["model.first.weight"])
            stored = ce.load(tmp_path / "run")["model"]
            assert all(np.array_equal(stored[name], expected[f"model.{name}"].numpy()) for name in stored)


def test_what_no_optimizer_has_is_copied_before_the_call_returns(tmp_path, monkeypatch):
    model, slow = Net(), SlowCopy(monkeypatch)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(list(model.first.parameters()), lr=0.1)
    state = {"model": model, "optimizer": optimizer, "average": average, "count": np.arange(5)}
    with ce.Checkpointer(tmp_path / "run", overlap=True) as checkpointer:
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        handle = checkpointer.save(1, state)
        with torch.no_grad():
            model.last.weight.zero_()
            model.norm.running_mean.fill_(7)
            for value in average.values():
                value.zero_()
            state["count"][:] = 0
        slow.asked.set()
        handle.durable.result()
    stored = ce.load(tmp_path / "run")
    assert stored["count"].tolist() == [0, 1, 2, 3, 4]
    for name, value in expected.items():
        assert np.array_equal(stored["model"][name], value.numpy())
        assert np.array_equal(stored["average"][name], value.numpy())


def test_a_change_past_the_fence_fails_the_save_instead_of_tearing_it(tmp_path, monkeypatch):
    model, slow = Net(), SlowCopy(monkeypatch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = ce.Checkpointer(tmp_path / "run", overlap=True)
    handle = checkpointer.save(1, {"model": model, "optimizer": optimizer})
    with torch.no_grad():
        model.first.weight.mul_(2)
    slow.asked.set()
    with pytest.raises(SaveFailedError, match=r"model\.first\.weight: changed by something other .* call fence"):
        handle.durable.result()
    with pytest.raises(SaveFailedError, match=r"the last save of this job failed: .*nothing is committed"):
        checkpointer.close()
    assert list((tmp_path / "run").glob("step-*/manifest-*")) == []


def test_code_that_changes_parameters_itself_waits_with_fence(tmp_path, monkeypatch):
    model, slow = Net(), SlowCopy(monkeypatch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model.first.weight.detach().clone()
    with ce.Checkpointer(tmp_path / "run", overlap=True) as checkpointer:
        checkpointer.fence()
        checkpointer.save(1, {"model": model, "optimizer": optimizer})
        with pytest.raises(DeadlineError, match="not complete after 0.05 s"):
            checkpointer.fence(0.05)
        slow.asked.set()
        checkpointer.fence()
        with torch.no_grad():
            model.first.weight.zero_()
    assert np.array_equal(ce.load(tmp_path / "run")["model"]["first.weight"], expected.numpy())


def test_a_closed_checkpointer_holds_no_optimizer_up(tmp_path):
    hooks = _global_optimizer_pre_hooks
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = len(hooks)
    with ce.Checkpointer(tmp_path / "run", overlap=True) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer})
        assert len(hooks) == before + 1
    assert len(hooks) == before
