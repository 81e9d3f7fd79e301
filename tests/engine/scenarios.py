"""What several real ranks go through together; `scenarios_job.py` runs them, `test_across_ranks.py` reports."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ckptengine as ce
from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    DeadlineError,
    LoadMismatchError,
    ReplicaMismatchError,
    SaveFailedError,
    StateError,
)

Scenario = Callable[[Communicator, Path], None]
SCENARIOS: dict[str, Scenario] = {}
SMALLER: dict[str, Scenario] = {}
"""What the first two ranks do afterwards with what the three have saved under the same name."""


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def smaller(function: Scenario) -> Scenario:
    SMALLER[function.__name__.removesuffix("_by_two")] = function
    return function


class Counting(Communicator):
    """Counts the operations in which ranks wait for each other."""

    def __init__(self, inner: Communicator) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self.inner, self.count = inner, 0

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        self.count += 1
        return self.inner.all_gather(value, timeout)

    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        self.count += 1
        return self.inner.broadcast(value, timeout, root)

    def barrier(self, timeout: float) -> None:
        self.count += 1
        self.inner.barrier(timeout)

    def store(self) -> KeyValueStore | None:
        return self.inner.store()

    def taken(self) -> int:
        """Return the count since the last call."""
        count, self.count = self.count, 0
        return count


class WithoutStore(Counting):
    """A group that has no store for background messages: they go through the checkpoint's storage."""

    def store(self) -> None:
        return None


def rows(comm: Communicator, fill: float, total: int = 7) -> ce.ShardedArray:
    """Return this rank's part of a table whose element [i, j] is fill + 10 i + j."""
    mine = np.array_split(np.arange(total), comm.world_size)[comm.rank]
    part = fill + 10.0 * mine[:, None] + np.arange(3.0)[None]
    return ce.ShardedArray(part, (total, 3), (int(mine[0]) if mine.size else total, 0))


def table(fill: float, total: int = 7) -> np.ndarray:
    return fill + 10.0 * np.arange(total)[:, None] + np.arange(3.0)[None]


def checkpointer(comm: Communicator, folder: Path, **options: Any) -> ce.Checkpointer:
    return ce.Checkpointer(folder, **{"every": 1, "timeout": 20.0, "comm": comm, **options})


def step_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def archive_of(folder: Path, rank: int) -> Path:
    (path,) = folder.glob(f"data-*/rank-{rank:05d}.zarr.zip")
    return path


def net() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Linear(5, 3)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5 + 0.25
    optimizer.step()


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Return the bits of a model and of its optimizer's state."""
    found = {name: value.detach().numpy().tobytes() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = value.numpy().tobytes()
    return found


# Plans.


@scenario
def later_saves_of_the_same_structure_use_no_collective(comm: Communicator, folder: Path) -> None:
    counting = Counting(comm)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    with checkpointer(counting, folder) as ckpt:
        saved = {}
        for step in range(1, 5):
            train(model, optimizer)
            saved[step] = tensors_of(model, optimizer)
            counting.taken()
            ckpt.step(step, {"model": model, "optimizer": optimizer, "rows": rows(comm, step), "step": step})
            assert (counting.taken() == 0) == (step > 1)
        ckpt.wait()
        assert [stats.step for stats in ckpt.history] == [1, 2, 3, 4]
    for step, tensors in saved.items():
        other = net()
        fresh = torch.optim.AdamW(other.parameters())
        state = {"model": other, "optimizer": fresh, "rows": rows(comm, 99), "step": 0}
        ce.load(step_of(folder, step), into=state, comm=comm)
        assert tensors_of(other, fresh) == tensors
        assert np.array_equal(state["rows"].local, rows(comm, step).local)
        assert state["step"] == step


@scenario
def an_optimizer_that_gets_its_state_between_saves_is_saved_right(comm: Communicator, folder: Path) -> None:
    counting = Counting(comm)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    saved, collectives = {}, {}
    with checkpointer(counting, folder) as ckpt:
        for step in range(4):
            if step:
                train(model, optimizer)
                state["rows"] = rows(comm, step)
            saved[step] = tensors_of(model, optimizer)
            ckpt.wait()
            counting.taken()
            ckpt.save(step, state).durable.result(30)
            collectives[step] = counting.taken()
        # Step 1 is written by plans that each rank made for itself; they plan together at step 2.
        assert collectives[1] == collectives[3] == 0 < collectives[2]
    for step, tensors in saved.items():
        other = net()
        fresh = torch.optim.AdamW(other.parameters())
        target: dict[str, Any] = {"model": other, "optimizer": fresh}
        if step:
            target["rows"] = rows(comm, 99)
        assert ce.load(step_of(folder, step), into=target, comm=comm).complete
        assert tensors_of(other, fresh) == tensors
        if step:
            assert np.array_equal(target["rows"].local, rows(comm, step).local)


@smaller
def an_optimizer_that_gets_its_state_between_saves_is_saved_right_by_two(comm: Communicator, folder: Path) -> None:
    for step in (1, 2, 3):
        arrays = ce.load(step_of(folder, step))
        assert np.array_equal(arrays["rows"], table(step))
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"model": model, "optimizer": optimizer, "rows": rows(comm, 99)}
        ce.load(step_of(folder, step), into=state, comm=comm)
        assert np.array_equal(state["rows"].local, rows(comm, step).local)
        for name, parameter in model.named_parameters():
            exp_avg = arrays["optimizer"]["state"][f"model.{name}"]["exp_avg"]
            assert optimizer.state[parameter]["exp_avg"].numpy().tobytes() == exp_avg.tobytes()


@scenario
def a_leaf_that_one_rank_alone_adds_is_saved_with_the_rest(comm: Communicator, folder: Path) -> None:
    state: dict[str, Any] = {"a": np.arange(5.0), "rows": rows(comm, 1)}
    with checkpointer(comm, folder) as ckpt:
        ckpt.save(1, state).durable.result(30)
        if comm.rank == 1:
            state["extra"] = np.arange(3)
        ckpt.save(2, state).durable.result(30)
        if comm.rank == 1:
            del state["extra"]
        state["a"] = np.arange(5.0) + 3
        ckpt.save(3, state).durable.result(30)
        ckpt.save(4, state).durable.result(30)
    assert np.array_equal(ce.load(step_of(folder, 2))["extra"], np.arange(3))
    for step in (1, 2, 3, 4):
        arrays = ce.load(step_of(folder, step))
        assert np.array_equal(arrays["a"], np.arange(5.0) + (3 if step > 2 else 0))
        assert np.array_equal(arrays["rows"], table(1))
        assert ("extra" in arrays) == (step == 2)


@scenario
def a_leaf_that_one_rank_alone_changes_is_named_on_all_ranks(comm: Communicator, folder: Path) -> None:
    with checkpointer(comm, folder) as ckpt:
        ckpt.save(1, {"a": np.arange(5.0), "b": 1}).durable.result(30)
        handle = ckpt.save(2, {"a": np.arange(6.0 if comm.rank == 1 else 5.0), "b": 1})
        with pytest.raises(SaveFailedError, match=r"a: rank 0 wrote .*\(5,\).* rank 1 .*\(6,\)"):
            handle.durable.result(30)
        ckpt.save(3, {"a": np.arange(6.0), "b": 1}).durable.result(30)
        ckpt.wait()
        assert [stats.step for stats in ckpt.history] == [1, 3]
    assert not step_of(folder, 2).exists() or not list(step_of(folder, 2).glob("manifest*"))
    assert np.array_equal(ce.load(folder)["a"], np.arange(6.0))


@scenario
def a_shard_that_one_rank_alone_gives_up_is_named_on_all_ranks(comm: Communicator, folder: Path) -> None:
    with checkpointer(comm, folder) as ckpt:
        ckpt.save(1, {"t": rows(comm, 0), "b": 1}).durable.result(30)
        state = {"t": rows(comm, 0), "b": 1} if comm.rank != 2 else {"b": 1}
        with pytest.raises(SaveFailedError, match="t: 6 of 21 elements were written by no rank"):
            ckpt.save(2, state).durable.result(30)
        ckpt.save(3, {"t": rows(comm, 5), "b": 1}).durable.result(30)
    assert np.array_equal(ce.load(folder)["t"], table(5))


@scenario
def a_state_that_one_rank_alone_can_not_save_fails_on_all_ranks(comm: Communicator, folder: Path) -> None:
    good: dict[str, Any] = {"a": np.arange(5.0)}
    bad = {"a": np.arange(5.0), "inner": {"thing": object()}}
    with pytest.raises(StateError, match="inner.thing"):
        ce.save(folder / "single", bad if comm.rank == 2 else good, comm=comm, timeout=20)
    with checkpointer(comm, folder) as ckpt:
        ckpt.save(1, good).durable.result(30)
        if comm.rank == 2:
            with pytest.raises(StateError, match="inner.thing"):
                ckpt.save(2, bad)
        else:
            with pytest.raises(SaveFailedError, match=r"rank 2: .*inner.thing"):
                ckpt.save(2, good).durable.result(30)
        ckpt.save(3, good).durable.result(30)
    assert ce.load(folder)["a"].tolist() == good["a"].tolist()


@scenario
def a_large_replica_is_written_by_all_ranks_together(comm: Communicator, folder: Path) -> None:
    large = np.random.default_rng(1).standard_normal((1025, 1100)).astype(np.float32)
    state = {"large": large, "small": np.arange(3)}
    stats = ce.save(folder, state, comm=comm, timeout=30)
    assert stats.nbytes > large.nbytes / 4
    target = {"large": np.zeros_like(large), "small": np.zeros(3, np.int64)}
    ce.load(folder, into=target, comm=comm)
    assert np.array_equal(target["large"], large)
    assert np.array_equal(target["small"], np.arange(3))


@scenario
def a_key_that_one_rank_alone_can_not_write_fails_on_all_ranks(comm: Communicator, folder: Path) -> None:
    state: dict[str, Any] = {"a": np.arange(5.0)}
    with checkpointer(comm, folder) as ckpt:
        ckpt.save(1, state).durable.result(30)
        if comm.rank == 2:
            with pytest.raises(StateError, match=r"kkk.*the key has 70006 bytes"):
                ckpt.save(2, {**state, "k" * 70_000: np.arange(3)})
        else:
            with pytest.raises(SaveFailedError, match=r"rank 2: kkk"):
                ckpt.save(2, state).durable.result(30)
        ckpt.save(3, state).durable.result(30)
    # Found after the ranks have planned together, by the one that would write it.
    own = {"own": ce.PerRank({"\ud800" if comm.rank == 1 else "k": np.arange(3)})}
    with pytest.raises(CheckpointError, match="lone surrogate"):
        ce.save(folder / "single", own, comm=comm, timeout=20)
    ce.save(folder / "single", state, comm=comm, timeout=20)


@scenario
def a_job_without_a_store_reports_through_the_storage(comm: Communicator, folder: Path) -> None:
    own = WithoutStore(comm)
    with checkpointer(own, folder) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"rows": rows(comm, step), "step": step}).durable.result(30)
        with pytest.raises(ReplicaMismatchError, match="step: not rank 0's on rank 1"):
            ckpt.save(3, {"rows": rows(comm, 3), "step": comm.rank % 2}).durable.result(30)
        dist.barrier()
        ckpt.save(3, {"rows": rows(comm, 4), "step": 3}).durable.result(30)
    dist.barrier()
    assert np.array_equal(ce.load(folder)["rows"], table(4))
    assert not list(folder.glob("step-*/data-*/receipts"))


# Replicas, and state of each rank's own.


@scenario
def values_that_differ_are_named_before_anything_is_written(comm: Communicator, folder: Path) -> None:
    state = {"words": {"same": 1, "cursor": comm.rank // 2}, "a": np.arange(3)}
    with pytest.raises(ReplicaMismatchError, match=r"words.*not rank 0's on rank 2.*PerRank"):
        ce.save(folder / "single", state, comm=comm, timeout=20)
    with checkpointer(comm, folder / "run") as ckpt, pytest.raises(ReplicaMismatchError, match="rank 2"):
        ckpt.step(1, state)
    assert not [path for path in folder.rglob("*") if path.name.startswith(("data-", "manifest-"))]
    only_one = {"a": np.arange(3), **({"odd": 1} if comm.rank == 1 else {})}
    with pytest.raises(ReplicaMismatchError, match="odd: not on all of rank 0 and rank 1"):
        ce.save(folder / "single", only_one, comm=comm, timeout=20)
    ce.save(folder / "single", {"a": np.arange(3)}, comm=comm, timeout=20)
    assert ce.load(folder / "single")["a"].tolist() == [0, 1, 2]


@scenario
def values_that_differ_later_surface_when_durable_is_asked(comm: Communicator, folder: Path) -> None:
    with checkpointer(comm, folder) as ckpt:
        ckpt.save(1, {"cursor": 1}).durable.result(30)
        handle = ckpt.save(2, {"cursor": comm.rank // 2})
        assert handle.staged.wait(30)
        with pytest.raises(ReplicaMismatchError, match="cursor: not rank 0's on rank 2"):
            handle.durable.result(30)
        ckpt.save(3, {"cursor": 3}).durable.result(30)
    assert [path.name for path in sorted(folder.glob("step-*")) if list(path.glob("manifest*"))] == [
        "step-00000001",
        "step-00000003",
    ]
    assert ce.load(folder) == {"cursor": 3}


@scenario
def replicated_arrays_that_differ_are_found_on_request(comm: Communicator, folder: Path) -> None:
    def state(different: bool) -> dict[str, Any]:
        a, b = torch.arange(12.0).reshape(3, 4).t(), np.arange(100_000)
        if different and comm.rank == 1:
            a[1, 2] = 77
        return {"a": a, "deep": {"b": b}, "buffers": torch.nn.BatchNorm1d(3), "rows": rows(comm, 0)}

    for number in (1, 2):  # by a fresh plan and by a known one
        with pytest.raises(ReplicaMismatchError, match=r"\Wa: the replicas on rank 1 differ from that of rank 0"):
            ce.save(folder / "single", state(True), comm=comm, timeout=20, check_replicas=True)
        ce.save(folder / f"good-{number}", state(False), comm=comm, timeout=20, check_replicas=True)
    ce.save(folder / "unchecked", state(True), comm=comm, timeout=20)
    with checkpointer(comm, folder / "run", check_replicas=True) as ckpt:
        ckpt.save(1, state(False)).durable.result(30)
        with pytest.raises(ReplicaMismatchError, match="the replicas on rank 1 differ"):
            ckpt.save(2, state(True)).durable.result(30)


def own_state(comm: Communicator, filled: bool, resize: Any = None) -> dict[str, Any]:
    rank = comm.rank if filled else -7
    generator = torch.Generator()
    generator.manual_seed(rank + 100)
    return {
        "cursor": ce.PerRank(rank * 3, resize),
        "noise": ce.PerRank({"a": np.full(rank % 3 + 1 if filled else comm.rank % 3 + 1, rank)}, resize),
        "generator": ce.PerRank(generator.get_state(), resize),
        "shared": 5 if filled else 0,
    }


@scenario
def each_rank_gets_its_own_back(comm: Communicator, folder: Path) -> None:
    ce.save(folder / "first", own_state(comm, True), comm=comm, timeout=20)
    state = own_state(comm, False)
    ce.load(folder / "first", into=state, comm=comm)
    want = own_state(comm, True)
    assert state["cursor"].value == comm.rank * 3
    assert state["noise"].value["a"].tolist() == want["noise"].value["a"].tolist()
    assert torch.equal(state["generator"].value, want["generator"].value)
    assert state["shared"] == 5
    with pytest.raises(LoadMismatchError, match="cursor: .*PerRank"):
        ce.load(folder / "first", into={**state, "cursor": 0}, comm=comm)


@smaller
def each_rank_gets_its_own_back_by_two(comm: Communicator, folder: Path) -> None:
    with pytest.raises(LoadMismatchError, match="cursor: saved per rank by 3 ranks, loaded by 2"):
        ce.load(folder / "first", into=own_state(comm, False), comm=comm)

    def resize(saved: list[Any], rank: int, world_size: int) -> Any:
        assert (len(saved), rank, world_size) == (3, comm.rank, 2)
        return saved[rank + 1]

    state = own_state(comm, False, resize)
    ce.load(folder / "first", into=state, comm=comm)
    assert state["cursor"].value == (comm.rank + 1) * 3
    assert state["noise"].value["a"].tolist() == [comm.rank + 1] * (comm.rank + 2)
    generator = torch.Generator()
    generator.manual_seed(comm.rank + 101)
    assert torch.equal(state["generator"].value, generator.get_state())


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
            assert ckpt.restore({"a": 0, "rows": rows(comm, 0)}) == (saved[-1] if saved else None)
            steps = 0
            for step in range(first, first + 40):
                time.sleep(0.02 + 0.01 * comm.rank)
                if ckpt.step(step, {"a": step, "rows": rows(comm, step)}) is not None:
                    saved.append(step)
                    steps += 1
            assert 0 < steps < 35, saved
        ckpt.wait()
        assert [stats.step for stats in ckpt.history] == saved
    (folder / f"steps-{comm.rank}.json").write_text(json.dumps(saved))
    dist.barrier()
    assert json.loads((folder / "steps-0.json").read_text()) == saved


@scenario
def a_save_that_falls_due_while_one_is_in_flight_is_skipped_by_all(comm: Communicator, folder: Path) -> None:
    with checkpointer(comm, folder, when_busy="skip") as ckpt:
        first = ckpt.step(1, {"a": 1})
        assert first is not None
        first.durable.result(30)
        if comm.rank == 1:
            time.sleep(1.5)  # until it comes, the save is in flight on the others
        second = ckpt.step(2, {"a": 2})
        assert second is not None
        assert ckpt.step(3, {"a": 3}) is None
        second.durable.result(30)
        dist.barrier()
        assert ckpt.step(4, {"a": 4}) is not None
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
