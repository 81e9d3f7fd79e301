"""Under overlap nothing is torn, however the next step is computed: by which optimizer, graph, stream or process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ckptengine as ce

OPTIMIZERS = {
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


def make(device, **how):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.BatchNorm1d(2048), torch.nn.Linear(2048, 512))
    model.to(device.name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **how)
    train(model, optimizer.step, device)
    return model, optimizer


def backward(model, device):
    model(torch.randn(64, 512, device=device.name)).square().mean().backward()


def train(model, step, device):
    backward(model, device)
    step()
    model.zero_grad()


def values(model, optimizer):
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"state.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return {name: tensor.detach().cpu().clone().numpy() for name, tensor in found.items()}


def check(path, expected):
    stored = ce.load(path)
    states = stored["optimizer"]["state"]
    for name, value in expected.items():
        what, _, rest = name.partition(".")
        if what == "model":
            assert np.array_equal(stored["model"][rest], value), name
        else:
            parameter, _, key = rest.rpartition(".")
            assert np.array_equal(states[f"model.{parameter}"][key], value), name


def check_saves(tmp_path, device, model, optimizer, step):
    """Save while the device has work to do, step at once, and compare with what it was at the call."""
    with ce.Checkpointer(tmp_path / "run", overlap=True) as run:
        for number in (1, 2, 3):
            expected = values(model, optimizer)
            device.slow_down()
            handle = run.save(number, {"model": model, "optimizer": optimizer})
            step()
            handle.durable.result()
            check(tmp_path / "run", expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_step_of_any_optimizer_waits_for_the_copy(tmp_path, device, kind, monkeypatch):
    if kind == "capturable" and not device.real:
        adam = sys.modules["torch.optim.adam"]
        monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])
    model, optimizer = make(device, **OPTIMIZERS[kind])
    check_saves(tmp_path, device, model, optimizer, lambda: train(model, optimizer.step, device))


def test_the_step_after_accumulated_gradients_waits_for_the_copy(tmp_path, device):
    model, optimizer = make(device)

    def step():
        for _ in range(3):
            backward(model, device)
        train(model, optimizer.step, device)

    check_saves(tmp_path, device, model, optimizer, step)


@pytest.mark.parametrize("what", [pytest.param("optimizer", marks=pytest.mark.long), "whole step"])
def test_a_compiled_step_waits_for_the_copy(tmp_path, device, what):
    backend = "inductor" if device.real else "eager"
    model, optimizer = make(device)
    if what == "optimizer":
        compiled = torch.compile(optimizer.step, backend=backend)
        step = lambda: train(model, compiled, device)  # noqa: E731
    else:
        step = torch.compile(lambda: train(model, optimizer.step, device), backend=backend)
    step()
    check_saves(tmp_path, device, model, optimizer, step)


def test_an_optimizer_on_a_stream_of_its_own_waits_for_the_copy(tmp_path, device):
    model, optimizer = make(device)

    def step():
        backward(model, device)
        stream = device.stream()
        with stream:
            optimizer.step()
        device.follow(stream)
        model.zero_grad()

    check_saves(tmp_path, device, model, optimizer, step)


def test_a_step_in_a_graph_waits_for_the_copy(tmp_path, device):
    device.need_cuda("a CUDA graph")
    model, optimizer = make(device, capturable=True)
    batch = torch.randn(64, 512, device=device.name)

    def whole():
        optimizer.zero_grad(set_to_none=True)
        model(batch).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    check_saves(tmp_path, device, model, optimizer, graph.replay)


def test_a_graph_may_be_captured_while_a_save_is_copied(tmp_path, device):
    device.need_cuda("a CUDA graph")
    model, optimizer = make(device, capturable=True)
    batch = torch.randn(64, 512, device=device.name)
    model.eval()
    model(batch)
    with ce.Checkpointer(tmp_path / "run", overlap=True) as run:
        expected = values(model, optimizer)
        device.slow_down()
        handle = run.save(1, {"model": model, "optimizer": optimizer})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            result = model(batch)
        graph.replay()
        handle.durable.result()
        check(tmp_path / "run", expected)
        with torch.no_grad():
            assert torch.allclose(result, model(batch), atol=1e-4)


def launch(arguments, folder, ranks=1):
    """Run the job beside this file on some ranks; return what they ended with."""
    job = Path(__file__).with_name("gpu_job.py")
    places = {
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(ranks),
        "STORE": str(folder / f"store-{os.urandom(4).hex()}"),
    }
    processes = [
        subprocess.Popen([sys.executable, job, *arguments], env=os.environ | places | {"RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        return [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.long
@pytest.mark.parametrize("overlap", ["eager", "overlapped"])
def test_a_job_that_was_killed_ends_with_the_same_bits(tmp_path, device, overlap):
    assert launch(["train", str(tmp_path / "a"), "12", "never", overlap], tmp_path) == [0]
    assert launch(["train", str(tmp_path / "b"), "12", "7", overlap], tmp_path) == [-9]
    assert launch(["train", str(tmp_path / "b"), "12", "never", overlap], tmp_path) == [0]
    assert (tmp_path / "a" / "digest").read_text() == (tmp_path / "b" / "digest").read_text()


@pytest.mark.long
@pytest.mark.parametrize(("backend", "ranks"), [("nccl", 1), ("gloo", 2)])
def test_fsdp2_is_saved_and_restored_on_one_device(tmp_path, device, backend, ranks):
    if backend == "nccl":
        device.need_cuda("NCCL")
    assert launch(["fsdp2", str(tmp_path / "run"), backend], tmp_path, ranks) == [0] * ranks


def test_a_dead_context_fails_the_save_and_leaves_the_last_checkpoint(tmp_path, device):
    device.need_cuda("a context that an assertion on the device has killed")
    assert launch(["dead", str(tmp_path / "run")], tmp_path) == [0]
    assert np.array_equal(ce.load(tmp_path / "run")["weight"], np.ones((1000, 1000), np.float32))


def test_a_rank_on_the_second_device_makes_no_context_on_the_first(tmp_path, device):
    device.need_cuda("a context on a device")
    if torch.accelerator.device_count() < 2:
        pytest.skip("one accelerator is here, and this needs two")
    assert launch(["second", str(tmp_path / "run")], tmp_path) == [0]
