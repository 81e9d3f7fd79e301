"""Scenarios of waits, failures and the lives of a run."""

from __future__ import annotations

import contextlib
import json
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scenario_tools import (
    archive_of,
    checkpointer,
    net,
    rows,
    scenario,
    smaller,
    step_of,
    table,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptengine as ce
from ckptengine.catalog import receipt
from ckptengine.catalog.receipt import Channel
from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    DeadlineError,
    LoadMismatchError,
    SaveFailedError,
)
from ckptengine.save.committer import Committer
from ckptengine.snapshot.snapshotter import Snapshotter
from ckptengine.storage.local import LocalStorage

# Time.


@scenario
def what_changes_after_staged_does_not_change_the_checkpoint(comm: Communicator, folder: Path) -> None:
    model, part = net(), rows(comm, 4)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    handle = ce.async_save(folder, {"model": model, "rows": part}, comm=comm, timeout=20)
    assert handle.staged.done()
    handle.staged.result(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(99)
    part.local[...] = 99
    assert handle.durable.result(30).nbytes > 0
    arrays = ce.load(folder)
    assert np.array_equal(arrays["rows"], table(4))
    for name, value in before.items():
        assert np.array_equal(arrays["model"][name], value.numpy())


@scenario
def a_sharded_state_that_is_copied_while_training_goes_on_is_not_torn(comm: Communicator, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (comm.world_size,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 11), torch.nn.BatchNorm1d(11), torch.nn.Linear(11, 5))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    asked, fill = threading.Event(), Snapshotter.bring

    def slow(*arguments: Any) -> None:
        assert asked.wait(20)
        time.sleep(0.1)
        fill(*arguments)

    def train() -> None:
        model(torch.randn(6, 13)).square().sum().backward()
        asked.set()
        optimizer.step()
        optimizer.zero_grad()

    def whole() -> dict[str, np.ndarray]:
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, DTensor)}
        tensors |= {f"{n}.{key}": optimizer.state[p][key] for n, p in model.named_parameters() for key in ("exp_avg",)}
        return {name: value.full_tensor().clone().numpy() for name, value in tensors.items()}

    train()
    try:
        Snapshotter.bring = slow  # type: ignore[method-assign]
        with ce.Checkpointer(folder / "run", overlap=True, comm=comm, timeout=30) as run:
            expected = whole()
            asked.clear()
            handle = run.save(1, {"model": model, "optimizer": optimizer})
            assert not handle.staged.done()
            train()
            assert handle.staged.done()
            handle.durable.result(30)
            assert any(not np.array_equal(now, expected[name]) for name, now in whole().items())
    finally:
        Snapshotter.bring = fill  # type: ignore[method-assign]
    stored = ce.load(folder / "run")
    for name in dict(model.named_parameters()):
        assert np.array_equal(stored["model"][name], expected[name])
        assert np.array_equal(stored["optimizer"]["state"][f"model.{name}"]["exp_avg"], expected[f"{name}.exp_avg"])


@scenario
def a_rank_that_does_not_come_is_named_in_time(comm: Communicator, folder: Path) -> None:
    ckpt = checkpointer(comm, folder, timeout=3.0)
    ckpt.save(1, {"a": 1}).durable.result(30)
    if comm.rank != 1:
        handle = ckpt.save(2, {"a": 2})
        assert handle.staged.done()
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="rank 1 did not report in time"):
            handle.durable.result()
        assert time.monotonic() - began < 25
    dist.barrier()
    assert ce.load(folder) == {"a": 1}
    assert not [path for path in folder.rglob("manifest-*") if "step-00000002" in str(path)]


@scenario
def each_save_has_a_timeout_of_its_own(comm: Communicator, folder: Path) -> None:
    ce.save(folder, {"a": 1}, comm=comm, timeout=60)
    if comm.rank != 2:
        with pytest.raises(DeadlineError, match="rank 2 did not come within 2 s"):
            ce.save(folder, {"a": 2}, comm=comm, timeout=2)
    dist.barrier()
    assert ce.load(folder) == {"a": 1}


@scenario
def a_rank_that_can_not_write_fails_the_save_on_all_ranks(comm: Communicator, folder: Path) -> None:
    state = {"rows": ce.ShardedArray(np.zeros(1 << 18), ((1 << 18) * comm.world_size,), (comm.rank << 18,))}
    with checkpointer(comm, folder, on_error="warn") as ckpt:
        ckpt.step(1, state)
        ckpt.wait()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if comm.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limit[1]))
        handle = ckpt.step(2, state)
        assert handle is not None
        with pytest.raises(CheckpointError, match=r"rank-00001.zarr.zip.*File too large"):
            handle.durable.result(30)
        if comm.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        else:
            with pytest.raises(SaveFailedError, match="rank 1: "):
                handle.durable.result(30)
        dist.barrier()
        assert not list(folder.glob("step-00000002/manifest*"))
        # The same step may be tried again.
        again = ckpt.step(2, state)
        assert again is not None
        again.durable.result(30)
        ckpt.wait()
        assert [stats.step for stats in ckpt.history] == [1, 2]
    dist.barrier()
    assert len(list(folder.glob("step-00000002/data-*"))) == 1  # the failed attempt left nothing


@scenario
def all_ranks_agree_on_the_steps_of_a_time_interval(comm: Communicator, folder: Path) -> None:
    saved = []
    with checkpointer(comm, folder, every="0.2s") as ckpt:
        # A life may begin at any step, and go back.
        for first in (5000, 100):
            began = time.monotonic()
            assert ckpt.restore({"a": 0, "rows": rows(comm, 0)}) == (saved[-1] if saved else None)
            steps = 0
            for step in range(first, first + 40):
                time.sleep(0.02 + 0.01 * comm.rank)
                if ckpt.step(step, {"a": step, "rows": rows(comm, step)}) is not None:
                    saved.append(step)
                    steps += 1
            assert 0 < steps <= (time.monotonic() - began) / 0.2, saved
        ckpt.wait()
        assert [stats.step for stats in ckpt.history] == saved
    (folder / f"steps-{comm.rank}.json").write_text(json.dumps(saved))
    dist.barrier()
    assert json.loads((folder / "steps-0.json").read_text()) == saved


@scenario
def a_save_that_falls_due_while_one_is_in_flight_is_skipped_by_all(comm: Communicator, folder: Path) -> None:
    asked, create = threading.Event(), LocalStorage.create_archive

    def later(*arguments: Any, **options: Any) -> Any:
        assert asked.wait(20)
        return create(*arguments, **options)

    def state(step: int) -> dict[str, Any]:
        return {"a": step, "rows": rows(comm, step)}

    with checkpointer(comm, folder, when_busy="skip") as ckpt, pytest.MonkeyPatch.context() as patched:
        first = ckpt.step(1, state(1))
        assert first is not None
        first.durable.result(30)
        if comm.rank == 1:  # until it has written its part, the save is in flight on all
            patched.setattr(LocalStorage, "create_archive", later)
        second = ckpt.step(2, state(2))
        assert second is not None
        assert ckpt.step(3, state(3)) is None
        asked.set()
        second.durable.result(30)
        dist.barrier()
        assert ckpt.step(4, state(4)) is not None
        ckpt.wait()
        assert [stats.step for stats in ckpt.history] == [1, 2, 4]


# Lives of a run.


@scenario
def a_run_goes_on_at_another_world_size(comm: Communicator, folder: Path) -> None:
    with checkpointer(comm, folder, every=10, keep_last=2) as ckpt:
        assert ckpt.restore({"rows": rows(comm, 0), "step": 0}) is None
        for step in range(1, 101):
            ckpt.step(step, {"rows": rows(comm, step), "step": step})
    state = {"rows": rows(comm, 0), "step": 0}
    with checkpointer(comm, folder, every=10, keep_last=3) as ckpt:
        assert ckpt.restore(state) == 100
        assert state["step"] == 100
        assert np.array_equal(state["rows"].local, rows(comm, 100).local)
        assert ckpt.restore(state, step=90) == 90
        assert np.array_equal(state["rows"].local, rows(comm, 90).local)
        for step in range(91, 96):
            ckpt.save(step, {"rows": rows(comm, -step), "step": step})
        with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint of step 50; there are steps"):
            ckpt.restore(state, step=50)
    # A new life, told by nobody: 95 is newer than the 100 of the life before.
    with checkpointer(comm, folder) as ckpt:
        assert ckpt.restore(state) == 95
        assert np.array_equal(state["rows"].local, rows(comm, -95).local)


@smaller
def a_run_goes_on_at_another_world_size_by_two(comm: Communicator, folder: Path) -> None:
    state = {"rows": rows(comm, 0), "step": 0}
    with checkpointer(comm, folder, keep_last=2) as ckpt:
        assert ckpt.restore(state) == 95
        assert np.array_equal(state["rows"].local, rows(comm, -95).local)
        ckpt.save(96, {"rows": rows(comm, 960), "step": 96}).durable.result(30)
    dist.barrier()  # rank 0 has cleaned up
    assert np.array_equal(ce.load(folder)["rows"], table(960))
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000095", "step-00000096"]


@scenario
def damage_that_one_rank_meets_sends_all_ranks_to_the_checkpoint_before(comm: Communicator, folder: Path) -> None:
    with checkpointer(comm, folder) as ckpt:
        for step in (10, 20):
            ckpt.save(step, {"rows": rows(comm, step, 90), "step": step}).durable.result(30)
        dist.barrier()
        if comm.rank == 0:
            path = archive_of(step_of(folder, 20), 2)
            data = bytearray(path.read_bytes())
            place = data.index(np.float64(20 + 10.0 * 70).tobytes())
            data[place] ^= 1
            path.write_bytes(data)
        dist.barrier()
        state = {"rows": rows(comm, 0, 90), "step": 0}
        with pytest.raises(CheckpointDamagedError, match="rank-00002.zarr.zip"):
            ce.load(step_of(folder, 20), into=state, comm=comm, timeout=20)
        assert ckpt.restore(state) == 10
        assert state["step"] == 10
        assert np.array_equal(state["rows"].local, rows(comm, 10, 90).local)
        ckpt.save(20, {"rows": rows(comm, 21, 90), "step": 20}).durable.result(30)
        assert ckpt.restore(state) == 20
        assert np.array_equal(state["rows"].local, rows(comm, 21, 90).local)


@scenario
def a_run_that_can_not_be_opened_is_an_error_on_all_ranks(comm: Communicator, folder: Path) -> None:
    (folder / f"file-{comm.rank}").write_text("")
    dist.barrier()
    with pytest.raises(CheckpointError, match="file-0"):
        checkpointer(comm, folder / "file-0" / "run")
    with pytest.raises(CheckpointError, match="file-0"):
        ce.save(folder / "file-0" / "single", {"a": 1}, comm=comm, timeout=20)
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        ce.load(folder, into={"a": 1}, comm=comm, timeout=20)
    ce.save(folder / "single", {"a": 1}, comm=comm, timeout=20)
    with pytest.raises(LoadMismatchError, match=r"missing in the checkpoint:\n  b"):
        ce.load(folder / "single", into={"a": 1, **({"b": 1} if comm.rank == 1 else {})}, comm=comm, timeout=20)


@scenario
def after_a_failure_of_one_rank_that_the_caller_survives_all_ranks_save_the_same_steps(
    comm: Communicator, folder: Path
) -> None:
    ckpt = checkpointer(comm, folder, on_error="raise")
    for step in range(1, 6):
        value = object() if step == 2 and comm.rank == 1 else step
        with contextlib.suppress(CheckpointError):
            ckpt.step(step, {"value": value})
    with contextlib.suppress(CheckpointError):
        ckpt.close()
    committed = sorted(int(path.parent.name[5:]) for path in folder.glob("step-*/manifest-*.json"))
    assert committed == [1, 3, 4, 5]


def save_apart(comm: Communicator, folder: Path, look: Callable[[Committer, str, str], bool]) -> None:
    """Have rank 2 save a step that is ahead of the others'; `look` is in the place of `Committer.left_out`."""
    with checkpointer(comm, folder) as ckpt, pytest.MonkeyPatch.context() as patched:
        ckpt.save(1, {"value": 1}).durable.result(30)
        patched.setattr(Committer, "left_out", look)
        with pytest.raises(SaveFailedError, match="not at the same step.*step-00000002.*step-00000003"):
            ckpt.save(3 if comm.rank == 2 else 2, {"value": 2}).durable.result(30)
        patched.undo()
        ckpt.save(4, {"value": 4}).durable.result(30)
    assert ce.load(folder) == {"value": 4}


@scenario
def ranks_at_different_steps_are_told_so(comm: Communicator, folder: Path) -> None:
    left_out = Committer.left_out

    def all_look_first(self: Committer, attempt: str, directory: str) -> bool:
        found = left_out(self, attempt, directory)
        dist.barrier()
        return found

    save_apart(comm, folder, all_look_first)


@scenario
def ranks_that_come_after_one_that_is_ahead_are_told_so_and_go_on_together(comm: Communicator, folder: Path) -> None:
    left_out = Committer.left_out

    def come_later(self: Committer, attempt: str, directory: str) -> bool:
        store = comm.store()
        assert store is not None
        channel = Channel(store, attempt, comm.rank, comm.world_size)
        while comm.rank != 2 and channel.place() is None:
            time.sleep(0.01)
        return left_out(self, attempt, directory)

    save_apart(comm, folder, come_later)


@scenario
def a_commit_that_rank_0_can_not_announce_is_found_by_the_others(comm: Communicator, folder: Path) -> None:
    put = receipt.put_large

    def fail(store: KeyValueStore, key: str, value: bytes) -> None:
        if "/outcome/" in key:
            raise CheckpointError("the store is gone")
        put(store, key, value)

    with pytest.MonkeyPatch.context() as patched, checkpointer(comm, folder, timeout=4.0) as ckpt:
        patched.setattr(receipt, "_GRACE", 0.5)
        ckpt.save(1, {"value": 1}).durable.result(30)
        patched.setattr(receipt, "put_large", fail)
        ckpt.save(2, {"value": 2}).durable.result(30)
        comm.barrier(30)
    assert ce.load(folder) == {"value": 2}
