"""Memory that the CPU can't address, on a pretended accelerator: there is none here. Its copies take their time."""

import gc
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended import FakeAccelerator
from torch.distributed import checkpoint as torchs

import ckptengine as ce
from ckptengine.dcp import Writer
from ckptengine.errors import CheckpointError, DeadlineError, SaveFailedError
from ckptengine.save.attempt import Attempt
from ckptengine.save.copier import Copier
from ckptengine.snapshot import arena
from ckptengine.snapshot.pack import CopyTable, Rows
from ckptengine.snapshot.snapshotter import Snapshotter
from ckptengine.tiers.memory import memory_root
from ckptengine.torch import accelerator as engines


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


def values(model, optimizer=None):
    tensors = dict(model.state_dict())
    if optimizer is not None:
        tensors |= {f"{name}.exp_avg": optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
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
            assert accelerator.log == [], "buffers are kept on the device: the call waits for no copy"
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


def refuse(*arguments):
    raise torch.OutOfMemoryError("out of memory")


def test_a_device_without_memory_fails_the_save_under_overlap_and_not_the_training(tmp_path, accelerator, monkeypatch):
    model, optimizer = make()
    state = {"model": model, "optimizer": optimizer}
    with ce.Checkpointer(tmp_path / "run", overlap=True) as run:
        with monkeypatch.context() as patch:
            patch.setattr(accelerator.link, "to_host", refuse)
            handle = run.save(1, state)
            train(model, optimizer)
            with pytest.raises(CheckpointError, match=r"was not saved: rank 0: .* OutOfMemoryError: out of memory"):
                handle.durable.result()
        expected = values(model, optimizer)
        handle = run.save(2, state)
        train(model, optimizer)
        handle.durable.result()
        check(tmp_path / "run", expected)


def test_without_memory_for_copies_of_buffers_the_call_waits_for_them(tmp_path, accelerator, monkeypatch):
    model, optimizer = make()
    accelerator.room = 0
    with ce.Checkpointer(tmp_path / "run", overlap=True) as run:
        for step in (1, 2):
            accelerator.hold.clear()
            accelerator.log.clear()
            expected = values(model, optimizer)
            handle = run.save(step, {"model": model, "optimizer": optimizer})
            assert set(accelerator.log) == {"in order"}
            assert not handle.staged.done()
            accelerator.hold.set()
            train(model, optimizer)
            handle.durable.result()
            check(tmp_path / "run", expected)


def test_a_copy_that_fails_leaves_none_under_way(tmp_path, accelerator, monkeypatch):
    model, optimizer = make()
    begun, copy = [], accelerator.copy

    def failing(*arguments):
        if len(begun) == 5:
            raise torch.OutOfMemoryError("out of memory")
        begun.append(1)
        copy(*arguments)

    run = ce.Checkpointer(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "copy", failing)
        with pytest.raises(
            SaveFailedError, match=r"rank 0: [\w.]+ \([\d,]+ bytes\) could not be copied from cpu:0: OutOfMem"
        ):
            run.save(1, {"model": model, "optimizer": optimizer})
    assert len(accelerator.log) == 5, "the memory is the next save's, or is given back"
    run.save(2, {"model": model, "optimizer": optimizer}).durable.result()
    run.close()


def test_the_step_does_not_wait_for_the_checksums_of_what_came_from_a_device(tmp_path, accelerator, monkeypatch):
    model, optimizer = make()
    state = {"model": model, "optimizer": optimizer}
    begun, go_on = threading.Event(), threading.Event()
    fill = CopyTable.fill

    def slow(table, rows, *arguments):
        if rows is Rows.DEVICE:
            begun.set()
            assert go_on.wait(30)
        fill(table, rows, *arguments)

    monkeypatch.setattr(CopyTable, "fill", slow)
    for overlap in (True, False):
        with ce.Checkpointer(tmp_path / f"{overlap}", overlap=overlap) as run:
            for step in (1, 2):
                begun.clear(), go_on.clear()
                expected = values(model, optimizer)
                handle = run.save(step, state)
                assert begun.wait(30)
                train(model, optimizer)
                assert handle.staged.done()
                assert not handle.durable.done()
                go_on.set()
                handle.durable.result()
                check(tmp_path / f"{overlap}", expected)


COPYING = (
    "ckptengine/snapshot/",
    "ckptengine/torch/tensor",
    "ckptengine/torch/accelerator",
    "state/trace",
    "pretended",
)


def test_later_saves_run_no_python_for_each_tensor_of_a_device_before_the_call_returns(tmp_path, accelerator):
    accelerator.seconds = 0

    def calls_of_third_save(layers):
        model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers)))
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state, count = {"model": model, "optimizer": optimizer}, [0]

        def see(frame, event, argument):
            count[0] += event == "call" and any(part in frame.f_code.co_filename for part in COPYING)

        with ce.Checkpointer(tmp_path / f"{layers}", overlap=True) as run:
            for step in (1, 2):
                run.save(step, state).durable.result()
            accelerator.hold.clear()
            sys.setprofile(see)
            try:
                handle = run.save(3, state)
            finally:
                sys.setprofile(None)
            accelerator.hold.set()
            handle.durable.result()
        return count[0]

    few, many = calls_of_third_save(5), calls_of_third_save(55)
    assert many - few <= 20, "100 tensors of the model and 300 of the optimizer's state more"


@pytest.mark.parametrize("memory", [False, True], ids=["private", "memory tier"])
def test_the_memory_is_pinned_in_the_background_before_the_first_save(tmp_path, accelerator, memory):
    model, optimizer = make()
    with ce.Checkpointer(tmp_path / "run", memory=memory, every=100) as run:
        run.step(1, {"model": model, "optimizer": optimizer})
        deadline = time.monotonic() + 30
        while not accelerator.pinned and time.monotonic() < deadline:
            time.sleep(0.01)
        assert accelerator.pinned
        before = list(accelerator.pinned)
        run.save(2, {"model": model, "optimizer": optimizer}).durable.result()
        assert set(before) <= set(accelerator.pinned)  # the memory tier's second image may have come since
    assert accelerator.pinned == []


def test_a_device_that_fails_before_a_thread_has_made_it_current_is_what_the_save_tells(tmp_path, monkeypatch):
    accelerator = FakeAccelerator(monkeypatch, index=1)
    model, optimizer = make()
    go_on = Copier._go_on

    def failing(*arguments):
        accelerator.failure = RuntimeError("CUDA error: device-side assert triggered")
        go_on(*arguments)

    state = {"model": model, "optimizer": optimizer}
    with ce.Checkpointer(tmp_path / "run", overlap=True, timeout=20) as run:
        with monkeypatch.context() as patch:
            patch.setattr(Copier, "_go_on", failing)
            handle = run.save(1, state)
            with pytest.raises(
                SaveFailedError, match=r"rank 0: [\w.]+ .* cpu:1: .* device-side assert .*; the device may be unusable"
            ):
                handle.durable.result()
        accelerator.failure = None
        run.save(2, state).durable.result()


def test_while_a_copy_that_was_given_up_is_stuck_its_memory_is_neither_used_nor_given_back(
    tmp_path, accelerator, monkeypatch
):
    model, optimizer = make()
    state = {"model": model, "optimizer": optimizer}
    copy, stuck, go_on = accelerator.copy, threading.Event(), threading.Event()

    def blocking(*arguments):
        if not stuck.is_set():
            stuck.set()
            assert go_on.wait(30)
        copy(*arguments)

    run = ce.Checkpointer(tmp_path / "run", overlap=True, timeout=2)
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "copy", blocking)
        with pytest.raises(CheckpointError):
            run.save(1, state).durable.result()
        assert stuck.wait(30)
        with pytest.raises(SaveFailedError, match=r"copy of an earlier save, .* has not ended after 2 s"):
            run.save(2, state)
        with pytest.raises(DeadlineError, match=r"copy of an earlier save, .* has not ended after 2 s"):
            run._saver.close()
        go_on.set()
        assert run._saver._copier.settle(30)
    expected = values(model, optimizer)
    run.save(3, state).durable.result()
    run.close()
    check(tmp_path / "run", expected)


def test_memory_that_ctrl_c_has_left_to_a_device_is_not_the_next_saves(tmp_path, accelerator, monkeypatch):
    model, optimizer = make()
    state, answer = {"model": model, "optimizer": optimizer}, threading.Event()

    def interrupted(*_):
        raise KeyboardInterrupt

    run = ce.Checkpointer(tmp_path / "run")
    run.save(1, state).durable.result()
    before = {address for address, _ in accelerator.pinned}
    accelerator.now.give(lambda: answer.wait(30))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engines, "_came", interrupted)  # and again, where it is waited for what was begun
        run.save(2, state)
    answer.set()
    expected = values(model, optimizer)
    run.save(3, state).durable.result()
    assert {address for address, _ in accelerator.pinned} > before, "the device may still write to the first one"
    run.close()
    check(tmp_path / "run", expected)


def test_windows_that_ctrl_c_has_left_to_a_device_are_not_given_back(tmp_path, accelerator, monkeypatch):
    model, _ = make()
    ce.save(tmp_path / "point", {"model": model})
    expected, given_back, give_back = values(model), [], arena._give_back
    answer, before = threading.Event(), {address for address, _ in accelerator.pinned}

    def interrupted(*_):
        raise KeyboardInterrupt

    def watched(address, *arguments):
        given_back.append(address)
        give_back(address, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(arena, "_give_back", watched)
        patch.setattr(engines, "_came", interrupted)
        accelerator.now.give(lambda: answer.wait(30))
        with pytest.raises(KeyboardInterrupt):
            ce.load(tmp_path / "point", into={"model": model})
        gc.collect()
    left = {address for address, _ in accelerator.pinned} - before
    assert left
    assert left.isdisjoint(given_back)
    answer.set()
    ce.load(tmp_path / "point", into={"model": model})
    check(tmp_path / "point", expected)


@pytest.mark.parametrize("load", [False, True], ids=["save", "load"])
def test_ctrl_c_between_two_copies_leaves_the_memory_to_a_device_that_does_not_answer(
    tmp_path, accelerator, monkeypatch, load
):
    state, copy = {"a": torch.ones(30, 30), "b": torch.ones(30, 30)}, accelerator.copy
    answer, begun, given_back = threading.Event(), [], []
    ce.save(tmp_path / "point", state)

    def interrupted(*arguments):
        if begun:
            raise KeyboardInterrupt
        begun.append(1)
        copy(*arguments)

    run, before = ce.Checkpointer(tmp_path / "run"), {address for address, _ in accelerator.pinned}
    accelerator.now.give(lambda: answer.wait(30))
    with monkeypatch.context() as patch:
        patch.setattr(engines, "_INTERRUPTED_SECONDS", 0.1)
        patch.setattr(accelerator, "copy", interrupted)
        patch.setattr(arena, "_give_back", lambda address, *_: given_back.append(address))
        with pytest.raises(CheckpointError, match="the device does not answer"):
            ce.load(tmp_path / "point", into=state) if load else run.save(1, state)
        gc.collect()
    left = {address for address, _ in accelerator.pinned} - before
    assert len(left) == 1
    assert left.isdisjoint(given_back)
    answer.set()
    run.save(2, state).durable.result()
    assert len({address for address, _ in accelerator.pinned} - before - left) == 1
    run.close()


def test_of_several_devices_that_do_not_answer_the_save_tells_how_long_it_waited(tmp_path, accelerator, monkeypatch):
    weights, answer = [torch.ones(30, 30), torch.ones(30, 30)], threading.Event()
    accelerator.places[weights[1].untyped_storage().data_ptr()] = 1
    for index in (0, 1):
        accelerator.queue(index).give(lambda: answer.wait(30))
    monkeypatch.setattr(Attempt, "left_for_devices", 0.2)
    run = ce.Checkpointer(tmp_path / "run")
    with pytest.raises(SaveFailedError, match=r"has not ended after 0\.2 s"):
        run.save(1, {"weights": weights})
    answer.set()
    run.save(2, {"weights": weights}).durable.result()
    run.close()


def test_the_memory_tier_goes_on_in_other_memory_than_was_left_to_a_device(tmp_path, accelerator, monkeypatch, caplog):
    state, answer = {"weight": torch.ones(30, 30)}, threading.Event()
    in_memory = Path(memory_root(str(tmp_path / "run"), True))
    with ce.Checkpointer(tmp_path / "run", memory=True) as run:
        run.save(1, state).durable.result()
        accelerator.now.give(lambda: answer.wait(30))
        with monkeypatch.context() as patch, pytest.raises(SaveFailedError, match="the device does not answer"):
            patch.setattr(Attempt, "left_for_devices", 0.2)
            run.save(2, state)
        answer.set()
        for step in (3, 4, 5):
            run.save(step, state).durable.result()
            run.flush()
            assert list(in_memory.glob(f"step-0000000{step}/data-*/rank-*"))
    assert "not kept in the memory tier" not in caplog.text


def test_pinning_that_does_not_end_does_not_hold_up_the_end_of_a_run_with_a_memory_tier(
    tmp_path, accelerator, monkeypatch
):
    pinned = threading.Event()
    monkeypatch.setattr(accelerator, "unsafe", lambda call: call == "cudaHostRegister" and pinned.wait(10))
    prepared = Snapshotter._prepared
    monkeypatch.setattr(Snapshotter, "_prepared", lambda snapshotter, timeout: prepared(snapshotter, 0.1))
    run = ce.Checkpointer(tmp_path / "run", every=100, memory=True)
    run.step(1, {"weight": torch.ones(30, 30)})
    run.close()
    (preparing,) = (one for one in threading.enumerate() if one.name == "ckptengine-arena")
    assert preparing.is_alive()
    pinned.set()
    preparing.join(30)
    shutil.rmtree(memory_root(str(tmp_path / "run"), True))


def test_a_save_through_torchs_own_calls_names_what_a_device_did_not_bring(tmp_path, accelerator):
    answer = threading.Event()
    accelerator.now.give(lambda: answer.wait(30))
    writer = Writer(tmp_path / "point", timeout=5)
    with pytest.raises(torchs.api.CheckpointException, match=r"weight \(.* bytes\) could not be copied from .*answer"):
        torchs.save({"weight": torch.ones(30, 30)}, storage_writer=writer, no_dist=True)
    answer.set()
