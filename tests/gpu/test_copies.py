"""Tensors from a device and back, bit for bit: every dtype and stride, and the memory that the copies go through."""

import contextlib
import functools
import gc
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pretended import FakeAccelerator

import ckptengine as ce
from ckptengine.errors import CheckpointError, DeadlineError, DeviceError
from ckptengine.load import loader
from ckptengine.save.attempt import Attempt
from ckptengine.schema.dtypes import DTYPES
from ckptengine.snapshot.snapshotter import Snapshotter
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
            device.compute(lambda: weight.add_(1))
            run.save(step, {"weight": weight}).durable.result()
            assert np.array_equal(ce.load(tmp_path / "run")["weight"], np.full((1000, 1000), step, np.float32))


def test_a_save_follows_the_stream_that_the_caller_works_on(tmp_path, device):
    weight = torch.zeros(1000, 1000, device=device.name)
    with ce.Checkpointer(tmp_path / "run") as run, device.stream():
        for step in (1, 2, 3):
            device.slow_down()
            device.compute(lambda: weight.add_(1))
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


@pytest.mark.parametrize("memory", [False, True], ids=["private", "memory tier"])
def test_without_pinned_memory_checkpoints_are_as_right(tmp_path, device, memory, monkeypatch, caplog):
    device.refuse_pinning(monkeypatch)
    weight = torch.randn(1000, 1000, device=device.name)
    expected = bytes_of(weight)
    with ce.Checkpointer(tmp_path / "run", memory=memory) as run:
        run.save(1, {"weight": weight}).durable.result()
        words(weight).zero_()
        assert run.restore({"weight": weight}) == 1
    device.synchronize()
    assert bytes_of(weight) == expected
    assert "cudaHostRegister could not pin" in caplog.text


def test_memory_that_can_not_be_pinned_is_told_and_leaves_no_error_behind(device, caplog):
    device.need_cuda("memory that is pinned twice")
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


@pytest.mark.parametrize("overlap", [False, True], ids=["eager", "overlapped"])
def test_a_device_out_of_memory_fails_the_save_and_not_the_training(tmp_path, device, overlap):
    model = torch.nn.Linear(1700, 1700, bias=False, device=device.name)
    model.weight.data = model.weight.data.t()  # on its way it is made contiguous, which takes memory there
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    run = ce.Checkpointer(tmp_path / "run", overlap=overlap)
    run.save(1, state).durable.result()
    expected = bytes_of(model.weight)
    with device.without_memory(1 << 10), pytest.raises(CheckpointError, match=FAILED + "OutOfMemoryError: .*free mem"):
        run.save(2, state).durable.result()
    with torch.no_grad():
        model.weight.zero_()
    assert run.restore(state) == 1
    device.synchronize()
    assert bytes_of(model.weight) == expected
    run.save(3, state).durable.result()
    run.close()


FAILED = r"(?s)step-00000002 was not saved: rank 0: model\.weight \(11,560,000 bytes\) could not be copied from \w+:0: "


def test_without_memory_to_clone_buffers_on_the_device_the_save_is_as_right(tmp_path, device, caplog):
    model = torch.nn.Linear(30, 30, device=device.name)
    model.register_buffer("mask", torch.randn(1700, 1700, device=device.name))
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    expected = bytes_of(model.mask)
    with ce.Checkpointer(tmp_path / "run", overlap=True) as run:
        with device.without_memory(1 << 10):
            handle = run.save(1, state)
        model.mask.zero_()
        handle.durable.result()
    assert ce.load(tmp_path / "run")["model"]["mask"].tobytes() == expected
    assert "has no memory to copy buffers there" in caplog.text


@pytest.mark.parametrize("overlap", [False, True], ids=["eager", "overlapped"])
def test_a_device_that_dies_in_a_copy_fails_the_save_and_leaves_the_last_checkpoint(tmp_path, overlap, monkeypatch):
    device = FakeAccelerator(monkeypatch)
    model = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    expected = model[0].weight.detach().clone().numpy()
    run = ce.Checkpointer(tmp_path / "run", overlap=overlap, timeout=20)
    run.save(1, state).durable.result()
    device.dies_at = 3
    for step in (2, 3):
        with pytest.raises(
            CheckpointError, match=rf"step-0000000{step} was not saved: rank 0: model\.0\.\w+ .*CUDA error"
        ):
            run.save(step, state).durable.result()
    optimizer.step()
    with pytest.raises(DeviceError, match=r"rank 0: .*model\.0\.\w+ .*CUDA error.*; the device may be unusable"):
        run.restore(state)
    with contextlib.suppress(CheckpointError):
        run.close()
    assert np.array_equal(ce.load(tmp_path / "run")["model"]["0.weight"], expected)


@pytest.mark.parametrize(("overlap", "memory"), [(False, False), (True, False), (True, True)])
def test_a_device_that_does_not_answer_ends_the_save_and_the_restore(tmp_path, overlap, memory, monkeypatch):
    device = FakeAccelerator(monkeypatch)
    model = torch.nn.Linear(300, 300)
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with ce.Checkpointer(tmp_path / "run", overlap=overlap) as run:
        run.save(1, state).durable.result()
    expected, answer = bytes_of(model.weight), threading.Event()
    device.now.give(lambda: answer.wait(30))
    run, other = (ce.Checkpointer(tmp_path / name, overlap=overlap, memory=memory) for name in ("run", "other"))
    plan = loader.plan_filling
    monkeypatch.setattr(loader, "plan_filling", lambda checkpoint, reads, *_: plan(checkpoint, reads, 0.2))
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"after 0\.2 s; the device does not ans"):
        patch.setattr(Attempt, "left_for_devices", 0.2)
        other.save(2, state).durable.result()
    with pytest.raises(DeviceError, match=r"model\.bias .*after 0\.2 s; the device does not answer") as error:
        run.restore({"model": torch.nn.Linear(300, 300)}, only=["model"])
    assert error.value.under_way
    run.close()
    before = {one for one, _ in device.pinned}
    answer.set()
    other.save(3, state).durable.result()
    now = {one for one, _ in device.pinned}
    assert now > before, "the device may still write to the memory of before: the next save comes into other memory"
    other.close()
    assert ce.load(tmp_path / "other")["model"]["weight"].tobytes() == expected


def test_a_save_while_a_graph_is_captured_is_refused(tmp_path, device):
    weight = torch.ones(1000, 1000, device=device.name)
    run = ce.Checkpointer(tmp_path / "run")
    run.save(1, {"weight": weight}).durable.result()
    with device.capture(), pytest.raises(CheckpointError, match="a graph is being captured; do this before the"):
        run.save(2, {"weight": weight})
    run.save(3, {"weight": weight}).durable.result()
    run.close()


def test_copies_are_no_part_of_a_graph_that_is_captured_on_the_stream_that_they_had(tmp_path, monkeypatch):
    device = FakeAccelerator(monkeypatch)
    weight = torch.randn(30, 30)
    expected = bytes_of(weight)
    ce.save(tmp_path / "point", {"weight": weight})
    for _ in range(2):
        weight.zero_()
        ce.load(tmp_path / "point", into={"weight": weight})
        assert bytes_of(weight) == expected
        (used,) = [queue for queue in device.queues.values() if queue.beside and queue not in device.captured]
        device.captured.append(used)


@pytest.mark.parametrize("overlap", [False, True], ids=["eager", "overlapped"])
def test_nothing_of_a_save_or_a_restore_spoils_the_capture_of_a_graph_in_another_thread(tmp_path, overlap, monkeypatch):
    device = FakeAccelerator(monkeypatch)
    device.captured_elsewhere = True
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30))
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with ce.Checkpointer(tmp_path / "run", overlap=overlap, every=10) as run:
        run.step(1, state)
        run.save(2, state).durable.result()
        assert run.restore(state) == 2
    assert device.log
    assert device.spoilt == []


@pytest.mark.parametrize("overlap", [False, True], ids=["eager", "overlapped"])
def test_no_context_is_made_on_a_device_that_the_rank_does_not_use(tmp_path, overlap, monkeypatch):
    device = FakeAccelerator(monkeypatch, index=1)
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    with ce.Checkpointer(tmp_path / "run", overlap=overlap) as run:
        run.save(1, state).durable.result()
        optimizer.step()
        assert run.restore(state) == 1
    assert device.contexts == {1}


def test_a_closed_checkpointer_keeps_nothing_of_its_copies(tmp_path, monkeypatch):
    FakeAccelerator(monkeypatch)
    made, host = [], accelerator.Link.host

    def watched(link, array):
        tensor = host(link, array)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(accelerator.Link, "host", watched)
    run = ce.Checkpointer(tmp_path / "run")
    run.save(1, {"weight": torch.randn(30, 30)}).durable.result()
    run.close()
    gc.collect()
    assert made
    assert [one for one in made if one() is not None] == []


@pytest.mark.parametrize("overlap", [False, True], ids=["eager", "overlapped"])
def test_tensors_of_several_devices_are_copied_after_what_each_has_still_to_compute(tmp_path, overlap, monkeypatch):
    fake = FakeAccelerator(monkeypatch)
    models = [torch.nn.Linear(100, 100, bias=False) for _ in range(2)]
    weights = [model.weight.data for model in models]
    fake.places[weights[1].untyped_storage().data_ptr()] = 1
    optimizer = torch.optim.SGD([weight for model in models for weight in model.parameters()], lr=0.1)
    state = {"models": models, "optimizer": optimizer}

    def compute(weight, value):
        time.sleep(0.03)
        weight.fill_(value)

    with ce.Checkpointer(tmp_path / "run", overlap=overlap) as run:
        for step in (1, 2):
            for index, weight in enumerate(weights):
                fake.queue(index).give(functools.partial(compute, weight, step + index))
            run.save(step, state).durable.result()
            stored = ce.load(tmp_path / "run")["models"]
            assert [float(one["weight"].mean()) for one in stored] == [step, step + 1]
        for weight in weights:
            weight.zero_()
        assert run.restore(state) == 2
    assert [float(weight.mean()) for weight in weights] == [2, 3]
    assert {index for index, _ in fake.queues} == {0, 1}


def test_two_checkpointers_copy_at_a_time_and_from_several_threads(tmp_path, device):
    if not device.real:
        device.pretended.seconds = 0
    state = {"weights": [torch.full((50, 50), float(n), device=device.name) for n in range(100)]}
    with (
        ce.Checkpointer(tmp_path / "a") as one,
        ce.Checkpointer(tmp_path / "b") as other,
        ThreadPoolExecutor(2) as threads,
    ):
        saves = [threads.submit(run.save, 1, state) for run in (one, other)]
        for save in saves:
            save.result().durable.result()
        targets = [{"weights": [torch.zeros(50, 50, device=device.name) for _ in range(100)]} for _ in saves]
        loads = [threads.submit(run.restore, target) for run, target in zip((one, other), targets, strict=True)]
        assert [load.result() for load in loads] == [1, 1]
    device.synchronize()
    for target in targets:
        assert [float(weight.min()) for weight in target["weights"]] == list(range(100))


def test_pinning_that_does_not_end_holds_neither_a_save_nor_the_end_up(tmp_path, monkeypatch):
    device, pinned = FakeAccelerator(monkeypatch), threading.Event()
    monkeypatch.setattr(device, "unsafe", lambda call: call == "cudaHostRegister" and pinned.wait(30))
    state = {"weight": torch.ones(30, 30)}
    prepared = Snapshotter._prepared
    monkeypatch.setattr(Snapshotter, "_prepared", lambda snapshotter, timeout: prepared(snapshotter, 0.1))
    run = ce.Checkpointer(tmp_path / "run", every=100)
    run.step(1, state)
    with pytest.raises(DeadlineError, match=r"memory is still being prepared, or pinned, after \d+ s"):
        run.save(2, state)
    run.close()
    pinned.set()


def test_the_devices_random_numbers_go_on_where_they_were(tmp_path, device):
    rng = ce.RNG()
    torch.rand(10, device=device.name)
    with ce.Checkpointer(tmp_path / "run") as run:
        run.save(1, {"rng": rng}).durable.result()
        expected = torch.rand(100, device=device.name).cpu()
        assert run.restore({"rng": rng}) == 1
        assert torch.equal(torch.rand(100, device=device.name).cpu(), expected)


def test_torch_has_what_the_pretended_device_answers_for():
    stream = torch.Stream(stream_id=3, device_index=0, device_type=1)
    assert (stream.stream_id, stream.device_index, stream.device_type) == (3, 0, 1)
    for name in ("record_event", "wait_event", "__enter__", "__exit__"):
        assert callable(getattr(torch.Stream, name))
    calls = (
        "current_accelerator",
        "current_device_index",
        "current_stream",
        "device_index",
        "is_available",
    )
    for module, names in (
        (torch.Event, ("query",)),
        (torch.Tensor, ("record_stream",)),
        (torch.accelerator, calls),
        (torch.cuda, ("cudart", "is_current_stream_capturing", "is_initialized")),
    ):
        assert all(callable(getattr(module, name)) for name in names)
