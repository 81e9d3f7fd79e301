"""What ranks do with torch's distributed checkpoint over this engine: one scenario after the other, on one group."""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckptengine as ce
import ckptengine.dcp as dcp

SCENARIOS: dict[str, Callable[[Path, int, int], None]] = {}


def scenario(call: Callable[[Path, int, int], None]) -> Callable[[Path, int, int], None]:
    SCENARIOS[call.__name__] = call
    return call


def whole() -> torch.Tensor:
    return torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)


def spread(tensor: torch.Tensor, *placements: Any, shape: tuple[int, ...] | None = None) -> DTensor:
    mesh = init_device_mesh("cpu", shape or (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, placements)


@scenario
def sharded_in_one_way_and_loaded_in_another(folder: Path, rank: int, world: int) -> None:
    state = {"rows": spread(whole(), Shard(0)), "same": spread(whole() + 1, Replicate()), "plain": whole() + 2}
    state |= {"both": spread(whole() + 3, Shard(1), Replicate(), shape=(2, world // 2))}
    dcp.save(state, checkpoint_id=folder / "c")
    zero = torch.zeros_like(whole())
    other = {"rows": spread(zero, Shard(1)), "same": spread(zero, Shard(0)), "plain": spread(zero, Shard(0))}
    other |= {"both": zero.clone()}
    dcp.load(other, checkpoint_id=folder / "c")
    for number, name in enumerate(("rows", "same", "plain")):
        assert torch.equal(other[name].full_tensor(), whole() + number), name
    assert torch.equal(other["both"], whole() + 3)
    # In the engine's own words, each is one array in one grid.
    assert all(((ce.load(folder / "c")[name] == (whole() + n).numpy()).all()) for n, name in enumerate(state))


@scenario
def a_group_that_is_a_part_of_the_job(folder: Path, rank: int, world: int) -> None:
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
        dcp.save({"x": distribute_tensor(whole(), mesh, [Shard(0)])}, checkpoint_id=folder / "c", process_group=group)
        target = {"x": distribute_tensor(torch.zeros(7, 6), mesh, [Shard(1)])}
        dcp.load(target, checkpoint_id=folder / "c", process_group=group)
        assert torch.equal(target["x"].full_tensor(), whole())
    dist.barrier()
    assert (ce.load(folder / "c")["x"] == whole().numpy()).all()


@scenario
def values_that_only_one_rank_has(folder: Path, rank: int, world: int) -> None:
    state = {f"stage{rank}": {"w": whole() + rank, "lr": rank / 10, "pair": (whole(), rank)}}
    dcp.save(state, checkpoint_id=folder / "c")
    everything = ce.load(folder / "c")
    assert sorted(everything) == [f"stage{number}" for number in range(world)]
    assert everything["stage3"]["lr"] == 0.3
    mine = {f"stage{rank}": {"w": torch.zeros(7, 6), "lr": None, "pair": None}}
    dcp.load(mine, checkpoint_id=folder / "c")
    assert torch.equal(mine[f"stage{rank}"]["w"], whole() + rank)
    assert mine[f"stage{rank}"]["lr"] == rank / 10
    tensor, number = mine[f"stage{rank}"]["pair"]
    assert torch.equal(tensor, whole())
    assert number == rank


@scenario
def values_that_differ_between_ranks_are_told(folder: Path, rank: int, world: int) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckptengine").addHandler(handler)
    dcp.save({"seed": rank, "lr": 0.1, "pair": (1, 2)}, checkpoint_id=folder / "c")
    logging.getLogger("ckptengine").removeHandler(handler)
    assert len(said) == (rank == 0), said
    assert all("seed: the ranks have different values" in text for text in said), said


@scenario
def sharded_tensors_of_the_old_kind(folder: Path, rank: int, world: int) -> None:
    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{number}/cpu" for number in range(world)])
    one, other = sharded_tensor.rand(spec, 9, 3), sharded_tensor.zeros(spec, 9, 3)
    dcp.save({"x": one}, checkpoint_id=folder / "c")
    dcp.load({"x": other}, checkpoint_id=folder / "c")
    for a, b in zip(one.local_shards(), other.local_shards(), strict=True):
        assert torch.equal(a.tensor, b.tensor)


@scenario
def plans_that_are_kept_between_saves(folder: Path, rank: int, world: int) -> None:
    for number in range(4):
        state = {"x": spread(whole() + number, Shard(0)), "n": number}
        dcp.save(state, checkpoint_id=folder / f"c{number}", planner=DefaultSavePlanner(enable_plan_caching=True))
    for number in range(4):
        loaded = ce.load(folder / f"c{number}")
        assert (loaded["x"] == (whole() + number).numpy()).all()
        assert loaded["n"] == number
    forget_plans()


@scenario
def plans_of_which_one_rank_s_has_changed(folder: Path, rank: int, world: int) -> None:
    for number in range(4):
        state = {"x": spread(whole() + number, Shard(0)), "one": spread(whole()[:1], Shard(0)), "n": number}
        if number >= 2 and rank == 2:
            state["more"] = whole() * number
        dcp.save(state, checkpoint_id=folder / f"c{number}", planner=DefaultSavePlanner(enable_plan_caching=True))
    for number in range(4):
        loaded = ce.load(folder / f"c{number}")
        assert (loaded["x"] == (whole() + number).numpy()).all()
        assert (loaded["one"] == whole()[:1].numpy()).all()
        assert loaded["n"] == number
        assert number < 2 or (loaded["more"] == (whole() * number).numpy()).all()
    forget_plans()


@scenario
def plans_that_are_kept_after_a_failed_save(folder: Path, rank: int, world: int) -> None:
    failures = []  # an error that is kept keeps its writer, and so what the failed save has left
    for number in range(4):
        state = {"x": spread(whole() + number, Shard(0)), f"n{rank}": object() if number == rank == 2 else number}
        writer = dcp.Writer(folder / "c", timeout=20)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        try:
            dcp.state_dict_saver.save(state, storage_writer=writer, planner=planner)
        except dcp.CheckpointException as error:
            failures.append((error, writer))
    assert len(failures) == 1, failures
    assert (ce.load(folder / "c")["x"] == (whole() + 3).numpy()).all()
    assert ce.load(folder / "c")["n1"] == 3
    forget_plans()


def forget_plans() -> None:
    for kept in ("save_plan", "all_plans", "global_plan", "metadata", "final_save_plan"):
        getattr(DefaultSavePlanner, f"_cached_{kept}").clear()


class Halved(DefaultSavePlanner):
    """Saves tensors as bfloat16 under other names, as in the documentation of torch's planners."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner({f"ema_{k}": v for k, v in state_dict.items()}, storage_meta, is_coordinator)

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.bfloat16
        return plan

    def resolve_data(self, write_item: Any) -> Any:
        item = super().resolve_data(write_item)
        return item if write_item.type == WriteItemType.BYTE_IO else item.to(torch.bfloat16)


@scenario
def a_planner_of_ones_own(folder: Path, rank: int, world: int) -> None:
    dcp.save({"x": spread(whole(), Shard(0)), "n": [1, (2, None)]}, checkpoint_id=folder / "c", planner=Halved())
    loaded = ce.load(folder / "c", as_torch=True)
    assert torch.equal(loaded["ema_x"], whole().bfloat16())
    assert loaded["ema_n"] == [1, (2, None)]
    target = {"ema_x": spread(torch.zeros(7, 6), Shard(1)), "more": 5}
    dcp.load(target, checkpoint_id=folder / "c", planner=DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(target["ema_x"].full_tensor(), whole())
    assert target["more"] == 5


@scenario
def without_collectives(folder: Path, rank: int, world: int) -> None:
    dcp.save({"x": whole() + rank, "n": rank}, checkpoint_id=folder / "c", use_collectives=False)
    target = {"x": torch.zeros(7, 6), "n": None}
    dcp.load(target, checkpoint_id=folder / "c")
    assert torch.equal(target["x"], whole() + rank)
    assert target["n"] == rank


@scenario
def a_mesh_whose_ranks_do_not_ascend(folder: Path, rank: int, world: int) -> None:
    """torch's planners put the parts in each other's places; the engine's own calls do not."""
    mesh = DeviceMesh("cpu", list(range(world))[::-1])
    even = torch.arange(2.0 * world)
    state = {"x": distribute_tensor(even, mesh, [Shard(0)])}
    with pytest.raises(dcp.CheckpointException, match="x: a DTensor on a mesh with the ranks"):
        dcp.save(state, checkpoint_id=folder / "c")
    dcp.save({"x": even + 1}, checkpoint_id=folder / "d")
    with pytest.raises(dcp.CheckpointException, match="x: a DTensor on a mesh with the ranks"):
        dcp.load(state, checkpoint_id=folder / "d")
    dcp.save({"x": distribute_tensor(even, mesh, [Replicate()])}, checkpoint_id=folder / "e")
    ce.load(folder / "d", into=state)
    assert torch.equal(state["x"].full_tensor(), even + 1)


@scenario
def one_rank_fails_and_the_checkpoint_before_stays(folder: Path, rank: int, world: int) -> None:
    dcp.save({"x": whole()}, checkpoint_id=folder / "c")
    before = sorted(path.name for path in (folder / "c").iterdir())
    dist.barrier()
    with pytest.raises(dcp.CheckpointException, match="n2: object can't be saved") as caught:
        dcp.save({"x": whole() + 1, f"n{rank}": object() if rank == 2 else 0}, checkpoint_id=folder / "c")
    assert list(caught.value.failures) == [2]
    dist.barrier()
    assert (ce.load(folder / "c")["x"] == whole().numpy()).all()
    dcp.save({"x": whole() + 2}, checkpoint_id=folder / "c")
    assert (ce.load(folder / "c")["x"] == (whole() + 2).numpy()).all()
    dist.barrier()
    after = sorted(path.name for path in (folder / "c").iterdir())
    assert len(after) == len(before) == 2, (before, after)


@scenario
def asynchronously_in_a_process_of_its_own(folder: Path, rank: int, world: int) -> None:
    kind = dcp.state_dict_saver.AsyncCheckpointerType.PROCESS
    for number in range(2):
        state = {"x": spread(whole() + number, Shard(0)), "n": number}
        future = dcp.async_save(state, checkpoint_id=folder / f"c{number}", async_checkpointer_type=kind)
        getattr(future, "upload_completion", future).result()
    assert ce.load(folder / "c1")["n"] == 1
    assert (ce.load(folder / "c1")["x"] == (whole() + 1).numpy()).all()


@scenario
def a_checkpoint_of_the_engines_own_calls(folder: Path, rank: int, world: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(net.parameters())
    net(whole()).sum().backward()
    optimizer.step()
    ce.save(folder / "c", {"model": net, "optimizer": optimizer, "x": spread(whole(), Shard(0)), "tied": net.weight})
    target = {"model": torch.nn.Linear(6, 5).state_dict(), "x": spread(torch.zeros(7, 6), Shard(1))}
    target |= {"tied": torch.zeros(5, 6)}
    dcp.load(target, checkpoint_id=folder / "c")
    assert torch.equal(target["model"]["weight"], net.weight)
    assert torch.equal(target["tied"], net.weight)
    assert torch.equal(target["x"].full_tensor(), whole())


@scenario
def ranks_that_see_different_checkpoints(folder: Path, rank: int, world: int) -> None:
    ce.save(folder / f"r{rank}", {"x": whole()}, comm=ce.SingleProcess())
    with pytest.raises(dcp.CheckpointException, match="different checkpoints"):
        dcp.load({"x": torch.zeros(7, 6)}, checkpoint_id=folder / f"r{rank}")


@scenario
def bytes_of_a_planner_that_hold_code(folder: Path, rank: int, world: int) -> None:
    class Pickles(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if write_item.type is not WriteItemType.BYTE_IO:
                return super().resolve_data(write_item)
            buffer = io.BytesIO()
            torch.save(replace, buffer)  # a function: unpickling it would import whatever it names
            return buffer

    with pytest.raises(dcp.CheckpointException, match="nothing is pickled"):
        dcp.save({"n": 1}, checkpoint_id=folder / "c", planner=Pickles())


def main(place: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    outcome = {}
    for name, call in SCENARIOS.items():
        folder = place / name
        folder.mkdir(exist_ok=True)
        dist.barrier()
        try:
            call(folder, rank, world)
            outcome[name] = ""
        except BaseException:
            outcome[name] = traceback.format_exc()
            break  # the ranks may be out of step
    (place / f"rank-{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
