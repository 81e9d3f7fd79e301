"""Memory that the CPU can't address, on a pretended accelerator: there is none here. Its copies take their time."""

import threading

import numpy as np
import pytest
import torch
from pretended import FakeAccelerator

import ckptengine as ce
from ckptengine.errors import SaveFailedError


@pytest.fixture
def accelerator(monkeypatch):
    return FakeAccelerator(monkeypatch)


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.BatchNorm1d(500))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    return model, optimizer


def train(model, optimizer):
    model(torch.randn(4, 300)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model, optimizer):
    tensors = dict(model.state_dict())
    tensors |= {f"{n}.{key}": optimizer.state[p][key] for n, p in model.named_parameters() for key in ("exp_avg",)}
    return {name: tensor.detach().clone().numpy() for name, tensor in tensors.items()}


def check(path, expected):
    stored = ce.load(path)
    for name, value in expected.items():
        if name.endswith(".exp_avg"):
            parameter = name.removesuffix(".exp_avg")
            assert np.array_equal(stored["optimizer"]["state"][f"model.{parameter}"]["exp_avg"], value)
        else:
            assert np.array_equal(stored["model"][name], value)


def test_what_a_device_holds_is_complete_when_the_call_returns(tmp_path, accelerator):
    model, optimizer = make()
    with ce.Checkpointer(tmp_path / "run") as run:
        for step in (1, 2, 3):
            expected = values(model, optimizer)
            handle = run.save(step, {"model": model, "optimizer": optimizer})
            train(model, optimizer)
            handle.durable.result()
            check(tmp_path / "run", expected)
        assert set(accelerator.log) == {"in order"}
        assert len(accelerator.pinned) == 1, "the memory is pinned once"
    assert accelerator.pinned == [], "and given back"


def test_under_overlap_the_step_waits_for_the_copies_from_a_device(tmp_path, accelerator):
    model, optimizer = make()
    with ce.Checkpointer(tmp_path / "run", overlap=True) as run:
        for step in (1, 2):
            accelerator.hold.clear()
            accelerator.log.clear()
            expected = values(model, optimizer)
            handle = run.save(step, {"model": model, "optimizer": optimizer})
            assert not handle.staged.done()
            assert set(accelerator.log) == {"in order"}, "buffers are there, parameters are not"
            threading.Timer(0.2, accelerator.hold.set).start()
            train(model, optimizer)
            assert handle.staged.done()
            handle.durable.result()
            check(tmp_path / "run", expected)


def test_a_devices_state_goes_through_less_memory_than_it_has(tmp_path, accelerator):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(9)))
    expected = {name: tensor.clone().numpy() for name, tensor in model.state_dict().items()}
    with ce.Checkpointer(tmp_path / "run", arena_nbytes=16 << 20) as run:
        handle = run.save(1, {"model": model})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        handle.durable.result()
    check(tmp_path / "run", expected)


class PretendedGraph(torch.cuda.CUDAGraph):
    """Replays an optimizer's step as a device does: without its hooks, and without autograd's counters."""

    def __new__(cls, replayed):
        return object.__new__(cls)

    def __init__(self, replayed):
        self.replayed, self._tracker = replayed, None

    def __del__(self):
        pass


def test_under_overlap_the_replay_of_a_graph_waits_for_the_copies(tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: graph.replayed())
    original = torch.cuda.CUDAGraph.replay
    model, optimizer = make()

    def replayed():
        for parameter in model.parameters():
            parameter.data.numpy()[...] += 1  # past the version counter

    graph = PretendedGraph(replayed)
    with ce.Checkpointer(tmp_path / "run", overlap=True) as run:
        for step in (1, 2):
            accelerator.hold.clear()
            expected = values(model, optimizer)
            handle = run.save(step, {"model": model, "optimizer": optimizer})
            threading.Timer(0.2, accelerator.hold.set).start()
            graph.replay()
            assert handle.staged.done()
            handle.durable.result()
            check(tmp_path / "run", expected)
    assert torch.cuda.CUDAGraph.replay is original, "torch's own is back when the Checkpointer is closed"


def test_a_copy_that_can_not_begin_leaves_none_under_way(tmp_path, accelerator, monkeypatch):
    model, optimizer = make()
    begin, begun = accelerator.begin, []

    def some(real, dst, beside):
        if len(begun) == 5:
            raise torch.OutOfMemoryError("out of memory")
        ended = threading.Event()
        begun.append(ended)
        wait = begin(real, dst, beside)
        return lambda: (wait(), ended.set())

    monkeypatch.setattr(accelerator, "begin", some)
    run = ce.Checkpointer(tmp_path / "run")
    with pytest.raises(SaveFailedError, match="was not saved: OutOfMemoryError"):
        run.save(1, {"model": model, "optimizer": optimizer})
    assert len(begun) == 5
    assert all(ended.is_set() for ended in begun), "the memory is the next save's, or is given back"
    monkeypatch.undo()
    run.save(2, {"model": model, "optimizer": optimizer}).durable.result()
    run.close()
