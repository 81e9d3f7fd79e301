"""Memory that the CPU can't address, on a pretended accelerator: there is none here. Its copies take their time."""

import threading
import time

import numpy as np
import pytest
import torch

import ckptengine as ce
from ckptengine.schema.leaf import DeviceMemory
from ckptengine.torch import tensor as torch_tensor


class FakeAccelerator:
    """Takes every tensor of more than one element for its own; copies in threads, as streams would."""

    def __init__(self, patch):
        self.hold, self.log = threading.Event(), []
        self.hold.set()
        self.pinned = []
        patch.setattr(torch_tensor, "_memory", self.memory)
        patch.setattr("ckptengine.torch.accelerator.pin_host_memory", self.pin)
        self._memory = torch_tensor.__dict__["_copied"]

    def memory(self, piece, path, *, target):
        real = self._memory(piece, piece, path)
        return DeviceMemory(real.copy_to_host, real.copy_from_host, piece, lambda *a: self.begin(real, *a))

    def begin(self, real, dst, beside):
        done = threading.Event()
        dst[...] = 0  # what is read too early is wrong

        def copy():
            if beside:
                assert self.hold.wait(30)
            time.sleep(0.01)
            real.copy_to_host(dst)
            done.set()

        threading.Thread(target=copy).start()

        def wait():
            assert done.wait(30)
            self.log.append("beside" if beside else "in order")

        return wait

    def pin(self, address, nbytes):
        self.pinned.append(nbytes)
        return lambda: self.pinned.remove(nbytes)


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
