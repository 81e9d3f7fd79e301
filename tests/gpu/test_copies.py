"""Tensors from a device and back, bit for bit: every dtype and stride, and the memory that the copies go through."""

import math

import numpy as np
import pytest
import torch

import ckptengine as ce
from ckptengine.errors import CheckpointError
from ckptengine.schema.dtypes import DTYPES
from ckptengine.torch import accelerator

NAMES = [name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)]

LAYOUTS = {
    "scalar": ((), lambda x: x),
    "contiguous": ((300, 700), lambda x: x),
    "transposed": ((300, 700), lambda x: x.t()),
    "every second": ((300, 700), lambda x: x[::2, 1::3]),
    "channels last": ((4, 8, 16, 16), lambda x: x.permute(0, 2, 3, 1)),
    "at an offset": ((301, 700), lambda x: x[1:]),
}


def bits(name, shape, device):
    """Return a tensor of random bits on a device; booleans are 0 and 1."""
    size = math.prod(shape) * getattr(torch, name).itemsize
    raw = torch.randint(0, 2 if name == "bool" else 256, (size,), dtype=torch.uint8)
    return raw.to(device).view(getattr(torch, name)).reshape(shape)


def words(tensor):
    """Return a tensor's bits as a type that all of torch's calls know."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return tensor.detach().view(kinds[tensor.element_size()])


def bytes_of(tensor):
    return words(tensor).cpu().contiguous().numpy().tobytes()


def tensors_of(name, device):
    torch.manual_seed(1)
    return {layout: view(bits(name, shape, device)) for layout, (shape, view) in LAYOUTS.items()}


@pytest.mark.parametrize("overlap", [False, True], ids=["eager", "overlapped"])
@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_and_stride_comes_back_bit_for_bit(tmp_path, device, overlap, name):
    state = {"tensors": tensors_of(name, device.name)}
    expected = {name: bytes_of(tensor) for name, tensor in state["tensors"].items()}
    with ce.Checkpointer(tmp_path / "run", overlap=overlap) as run:
        handle = run.save(1, state)
        for tensor in state["tensors"].values():
            words(tensor).zero_()
        handle.durable.result()
        assert run.restore(state) == 1
    device.synchronize()
    wrong = [name for name, tensor in state["tensors"].items() if bytes_of(tensor) != expected[name]]
    assert wrong == []


def test_what_the_device_has_still_to_compute_is_in_the_checkpoint(tmp_path, device):
    weight = torch.zeros(1000, 1000, device=device.name)
    with ce.Checkpointer(tmp_path / "run") as run:
        for step in (1, 2, 3):
            device.slow_down()
            weight.add_(1)
            run.save(step, {"weight": weight}).durable.result()
            assert np.array_equal(ce.load(tmp_path / "run")["weight"], np.full((1000, 1000), step, np.float32))


def test_a_save_follows_the_stream_that_the_caller_works_on(tmp_path, device):
    device.need("a stream of one's own")
    weight = torch.zeros(1000, 1000, device=device.name)
    stream = torch.Stream(torch.device(device.name))
    stream.wait_stream(torch.accelerator.current_stream())
    with ce.Checkpointer(tmp_path / "run") as run, stream:
        for step in (1, 2, 3):
            device.slow_down()
            weight.add_(1)
            run.save(step, {"weight": weight}).durable.result()
            assert np.array_equal(ce.load(tmp_path / "run")["weight"], np.full((1000, 1000), step, np.float32))


@pytest.mark.parametrize("memory", [False, True], ids=["private", "memory tier"])
def test_the_snapshots_memory_is_pinned_and_given_back(tmp_path, device, memory, monkeypatch):
    pinned = device.pinned if device.real else device.pretended.pinned
    if device.real:
        device.need_cuda("cudaHostRegister")
        device.watch_pinning(monkeypatch)
    weight = torch.randn(1000, 1000, device=device.name)
    with ce.Checkpointer(tmp_path / "run", memory=memory) as run:
        for step in (1, 2, 3):
            run.save(step, {"weight": weight}).durable.result()
        assert len(pinned) >= 1
    if not memory:
        assert pinned == []


def test_memory_that_can_not_be_pinned_is_told_and_leaves_no_error_behind(device, caplog):
    device.need_cuda("cudaHostRegister")
    memory = np.zeros(1 << 22, np.uint8)
    undo = accelerator.pin_host_memory(memory.ctypes.data, memory.nbytes)
    assert undo is not None
    assert accelerator.pin_host_memory(memory.ctypes.data, memory.nbytes) is None, "it is pinned already"
    assert "cudaHostRegister could not pin" in caplog.text
    torch.zeros(10, device=device.name).add_(1)
    undo()


def test_parameters_that_moved_to_the_cpu_and_back_are_saved_from_where_they_are(tmp_path, device):
    model = torch.nn.Linear(300, 300).to(device.name)
    with ce.Checkpointer(tmp_path / "run") as run:
        for step, place in enumerate(("cpu", device.name, "cpu", device.name), 1):
            model.to(place)
            with torch.no_grad():
                model.weight.add_(1)
            expected = model.weight.detach().cpu().clone()
            run.save(step, {"model": model}).durable.result()
            assert np.array_equal(ce.load(tmp_path / "run")["model"]["weight"], expected.numpy())


def test_a_device_out_of_memory_fails_the_save_and_not_the_training(tmp_path, device, monkeypatch):
    weight = torch.randn(1000, 1000, device=device.name)
    state = {"weight": weight.t()[::2]}
    run = ce.Checkpointer(tmp_path / "run")
    run.save(1, state).durable.result()
    expected = bytes_of(state["weight"])

    def refuse(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(device.pretended or accelerator.Link, "to_host", refuse)
        with pytest.raises(CheckpointError, match="was not saved: OutOfMemoryError"):
            run.save(2, state)
    weight.zero_()
    assert run.restore(state) == 1
    assert bytes_of(state["weight"]) == expected
    run.save(3, state).durable.result()
    run.close()


def test_the_devices_random_numbers_go_on_where_they_were(tmp_path, device):
    rng = ce.RNG()
    torch.rand(10, device=device.name)
    with ce.Checkpointer(tmp_path / "run") as run:
        run.save(1, {"rng": rng}).durable.result()
        expected = torch.rand(100, device=device.name).cpu()
        assert run.restore({"rng": rng}) == 1
        assert torch.equal(torch.rand(100, device=device.name).cpu(), expected)
