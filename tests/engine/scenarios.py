"""What several real ranks go through together; `scenarios_job.py` runs them, `test_across_ranks.py` reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scenario_tools import (
    Counting,
    WithoutStore,
    checkpointer,
    net,
    rows,
    scenario,
    smaller,
    step_of,
    table,
    tensors_of,
    train,
)

import ckptengine as ce
from ckptengine.comm.base import Communicator
from ckptengine.errors import (
    CheckpointError,
    LoadMismatchError,
    ReplicaMismatchError,
    SaveFailedError,
    StateError,
)

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
    assert not list(folder.glob("step-*/data-*/message-*"))
    assert len(list(folder.glob("step-*/data-*"))) == 3  # nothing of the attempt that failed


# Replicas, and state of each rank's own.


@scenario
def values_that_differ_are_named_before_anything_is_written(comm: Communicator, folder: Path) -> None:
    state = {"words": {"same": 1, "cursor": comm.rank // 2}, "a": np.arange(3)}
    with pytest.raises(ReplicaMismatchError, match=r"words.*not rank 0's on rank 2.*PerRank"):
        ce.save(folder / "single", state, comm=comm, timeout=20)
    with checkpointer(comm, folder / "run") as ckpt, pytest.raises(ReplicaMismatchError, match="rank 2"):
        ckpt.step(1, state)
    assert not [path for path in folder.rglob("*") if path.name.startswith(("data-", "manifest-"))]
    two_of_three = {"a": np.arange(3), **({"odd": comm.rank} if comm.rank else {})}
    with pytest.raises(ReplicaMismatchError, match="odd: not rank 1's on rank 2"):
        ce.save(folder / "single", two_of_three, comm=comm, timeout=20)
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


def replicas(comm: Communicator, different: bool) -> dict[str, Any]:
    a, b = torch.arange(12.0).reshape(3, 4).t(), np.arange(100_000)
    if different and comm.rank == 1:
        a[1, 2] = 77
    return {"a": a, "deep": {"b": b}, "buffers": torch.nn.BatchNorm1d(3), "rows": rows(comm, 0)}


@scenario
def replicated_arrays_are_compared_at_every_save_on_request(comm: Communicator, folder: Path) -> None:
    for number in (1, 2):  # by a fresh plan and by a known one
        with pytest.raises(ReplicaMismatchError, match=r"(^|\W)a: the replicas on rank 1 differ from that of rank 0"):
            ce.save(folder / "single", replicas(comm, True), comm=comm, timeout=20, check_replicas=True)
        ce.save(folder / f"good-{number}", replicas(comm, False), comm=comm, timeout=20, check_replicas="always")
    ce.save(folder / "unchecked", replicas(comm, True), comm=comm, timeout=20, check_replicas=False)
    with checkpointer(comm, folder / "run", check_replicas=True) as ckpt:
        ckpt.save(1, replicas(comm, False)).durable.result(30)
        with pytest.raises(ReplicaMismatchError, match="the replicas on rank 1 differ"):
            ckpt.save(2, replicas(comm, True)).durable.result(30)
        ckpt.save(3, replicas(comm, False)).durable.result(30)


@scenario
def plain_tensors_of_one_name_that_differ_are_found_at_the_first_save(comm: Communicator, folder: Path) -> None:
    """Each rank has an expert and a norm; the norm's statistics, a buffer, may differ, as torch has it."""
    torch.manual_seed(comm.rank)
    model = torch.nn.ModuleDict({"expert": torch.nn.Linear(4, 4), "norm": torch.nn.BatchNorm1d(4)})
    model["norm"].running_mean.fill_(comm.rank)
    state = {"model": model, "rows": rows(comm, 0)}
    with pytest.raises(
        ReplicaMismatchError, match=r"^model\.expert\.bias: .* ranks 1, 2 differ.*ShardedArray.*PerRank"
    ):
        ce.save(folder / "experts", state, comm=comm, timeout=20)
    assert not list(folder.rglob("manifest*"))
    with (
        checkpointer(comm, folder / "run", every=1) as ckpt,
        pytest.raises(ReplicaMismatchError, match=r"model\.expert\.bias"),
    ):
        ckpt.step(1, state)
    expert = model["expert"].weight
    declared = {
        "own": ce.PerRank(model["expert"].bias),
        "weight": ce.ShardedArray(expert, (4 * comm.world_size, 4), (4 * comm.rank, 0)),
        "norm": model["norm"],
    }
    ce.save(folder / "declared", declared, comm=comm, timeout=20)
    wanted = [model["expert"].bias.tolist(), expert.tolist()]
    with torch.no_grad():
        model["expert"].bias.zero_()
        expert.zero_()
    ce.load(folder / "declared", into=declared, comm=comm)
    assert [model["expert"].bias.tolist(), expert.tolist()] == wanted


@scenario
def replicas_are_compared_once_for_each_structure(comm: Communicator, folder: Path) -> None:
    def state(different: bool) -> dict[str, Any]:
        # Beside tensors that are declared as split, a second time: see tests/save/test_undeclared.py.
        return {name: value for name, value in replicas(comm, different).items() if name != "rows"}

    with checkpointer(comm, folder) as ckpt:
        ckpt.save(1, state(False)).durable.result(30)
        ckpt.save(2, state(True)).durable.result(30)  # the plan is known: nothing is compared
        more = {"moments": np.full(5, comm.rank)}
        with pytest.raises(ReplicaMismatchError, match="moments: the replicas on ranks 1, 2 differ"):
            ckpt.save(3, {**state(False), **more}).durable.result(30)
        with pytest.raises(ReplicaMismatchError, match="moments: the replicas on ranks 1, 2 differ"):
            ckpt.save(4, {**state(False), **more})
        ckpt.save(5, {**state(False), "moments": np.ones(5)}).durable.result(30)


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
