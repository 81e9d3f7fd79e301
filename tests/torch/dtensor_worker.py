"""One of four ranks under gloo: proves layout by layout that boxes and tensors agree; torchrun starts it.

Writes one JSON file for each rank: case name → "ok" or a traceback.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import traceback
from typing import Any

import dtensor_optimizers  # noqa: F401  (it registers its cases)
import numpy as np
import pytest
import torch
import torch.distributed as dist
from blocks import Blocks, BlockSGD, spread
from dtensor_cases import CASES, Block, Net, case, fsdp, fsdp_tp, full, gather, mesh_of
from state_memory import load, region, save
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import ckptengine as ce
from ckptengine.errors import StateError
from ckptengine.schema.leaf import Placement
from ckptengine.state.per_rank import PerRank
from ckptengine.state.tree import flatten
from ckptengine.torch import emptied

SHAPES = [(1, 5), (3, 2), (8, 4), (10, 3), (7, 10)]


def check(tensors: dict[str, torch.Tensor]) -> None:
    """Prove that the boxes hold what `full_tensor` gives, and that filling them gives it again."""
    stored = gather(dict(tensors))
    for name, tensor in tensors.items():
        assert np.array_equal(stored.arrays[(name,), None], full(tensor)), name
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert load(stored, dict(targets), rank=dist.get_rank()).complete
    for name, tensor in targets.items():
        assert torch.equal(tensor.to_local(), tensors[name].to_local()), name  # type: ignore[attr-defined]


def distributed(mesh: DeviceMesh, placements: list[Any]) -> dict[str, torch.Tensor]:
    """Return a tensor of each shape, split by torch's own functions.

    `distribute_tensor` refuses uneven sizes for `_StridedShard`, so its steps are done here one by one.
    """
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    tensors = {}
    for rows, columns in SHAPES:
        whole = torch.arange(float(rows * columns)).reshape(rows, columns)
        local = whole
        for placement, size, at in zip(placements, mesh.shape, coordinate, strict=True):
            if not isinstance(placement, Replicate):
                local = placement._split_tensor(local, size, with_padding=False)[0][at]
        tensors[f"{rows}x{columns}"] = DTensor.from_local(
            local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return tensors


def plain_layouts() -> dict[str, tuple[tuple[int, ...], list[Any]]]:
    return {
        "rows": ((4,), [Shard(0)]),
        "columns": ((4,), [Shard(1)]),
        "replicated": ((4,), [Replicate()]),
        "rows_replicated": ((2, 2), [Replicate(), Shard(0)]),
        "rows_by_columns": ((2, 2), [Shard(0), Shard(1)]),
        "rows_twice": ((2, 2), [Shard(0), Shard(0)]),
        "columns_twice": ((2, 2), [Shard(1), Shard(1)]),
        "strided_rows": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        "strided_columns": ((2, 2), [_StridedShard(1, split_factor=2), Shard(1)]),
        "strided_alone": ((4,), [_StridedShard(0, split_factor=3)]),
    }


def add_layout(name: str, shape: tuple[int, ...], placements: list[Any]) -> None:
    CASES[f"layout_{name}"] = lambda: check(distributed(mesh_of(*shape), placements))


for _name, _layout in plain_layouts().items():
    add_layout(_name, *_layout)


def check_module(model: nn.Module) -> None:
    stored = gather({"model": model})
    for key, tensor in model.state_dict().items():
        path = ("model", key)
        assert np.array_equal(stored.arrays[stored.saved.aliases.get(path, path), None], full(tensor)), key


@case
def fully_sharded() -> None:
    model = fsdp(mesh_of(4), Net())
    check_module(model)
    flat = flatten({"model": model})
    placements = {leaf.path[1]: leaf.placement for leaf in flat.arrays}
    assert placements["up.weight"] is Placement.SHARDED
    assert placements["norm.running_mean"] is Placement.WHOLE
    assert flat.aliases == {("model", "tied.weight"): ("model", "up.weight")}


@case
def parameters_that_a_forward_pass_has_left_gathered() -> None:
    """What is filled into them is lost when the module is sharded again; the module itself has the sharded ones."""
    model = fsdp(mesh_of(4), Net())
    before = dict(model.named_parameters())
    with torch.no_grad():
        model(torch.ones(4, 6))
    gathered = dict(model.named_parameters())
    assert not all(isinstance(one, DTensor) for one in gathered.values())
    with pytest.raises(StateError, match=r"parameters\..*has gathered for a forward pass.*put the module itself"):
        flatten({"parameters": gathered})
    check_module(model)  # it shards them again
    flatten({"parameters": before})
    flatten({"parameters": dict(model.named_parameters())})


@case
def parameters_beside_sharded_modules_cost_one_look_at_these() -> None:
    model, looked, groups = fsdp(mesh_of(4), Net()), [], emptied._groups
    emptied._groups = lambda state: looked.append(state) or groups(state)
    try:
        flatten({"model": model, "parameters": [nn.Parameter(torch.ones(2)) for _ in range(8)]})
    finally:
        emptied._groups = groups
    assert looked
    assert len(looked) == len(set(map(id, looked)))


@case
def meshes_whose_ranks_do_not_ascend() -> None:
    """torch hands out parts by the ranks in a process group, which ascend whatever their order in the mesh."""
    whole = torch.arange(48.0).reshape(8, 6)
    for ranks, placements in (
        ([3, 2, 1, 0], [Shard(0)]),
        ([2, 0, 3, 1], [Shard(0)]),
        ([[3, 1], [2, 0]], [Shard(0), Shard(1)]),
        ([[0, 1], [3, 2]], [Replicate(), Shard(0)]),
    ):
        mesh = DeviceMesh("cpu", ranks)
        check({"tensor": distribute_tensor(whole, mesh, placements)})
    check_module(fsdp(DeviceMesh("cpu", [3, 2, 1, 0]), nn.Linear(6, 8)))
    with pytest.raises(StateError, match="in the order of their parts"):
        ce.Sharded(torch.ones(2), dim=0, group=DeviceMesh("cpu", [3, 2, 1, 0]))


@case
def hybrid_sharded() -> None:
    check_module(fsdp(mesh_of(2, 2), Net()))


@case
def sharded_along_columns() -> None:
    wide = nn.Linear(8, 5, bias=False)
    check_module(fsdp(mesh_of(4), wide, shard_placement_fn=lambda _: Shard(1)))


@case
def tensor_parallel() -> None:
    model = Block(12)
    check_module(parallelize_module(model, mesh_of(4), {"up": ColwiseParallel(), "down": RowwiseParallel()}))


@case
def fully_sharded_tensor_parallel() -> None:
    for hidden in (10, 8, 6, 2):
        model = fsdp_tp(hidden)
        assert any(isinstance(p, _StridedShard) for p in model.up.weight.placements)
        check_module(model)


@case
def data_parallel_replicas_are_written_once() -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    flat = flatten({"model": model})
    assert {leaf.path for leaf in flat.arrays} == {leaf.path for leaf in flatten({"model": Net()}).arrays}
    assert {leaf.placement for leaf in flat.arrays} == {Placement.REPLICATED, Placement.WHOLE}
    stored = gather({"model": model})
    target = fsdp(mesh_of(4), Net())
    assert load(stored, {"model": target}, rank=dist.get_rank()).complete
    for key, tensor in model.module.state_dict().items():
        assert np.array_equal(full(target.state_dict()[key]), full(tensor)), key


@case
def the_unsharded_parameters_of_a_forward_pass_are_not_taken() -> None:
    model = fsdp(mesh_of(4), Net(), reshard_after_forward=False)
    before = gather({"model": model}).arrays
    with torch.no_grad():
        model.eval()(torch.ones(2, 6))
    after = gather({"model": model})
    assert after.saved.leaves["model", "up.weight"].placement is Placement.SHARDED
    assert all(np.array_equal(after.arrays[key], before[key]) for key in before)


@case
def what_is_no_part_of_a_tensor_is_refused() -> None:
    mesh = mesh_of(4)
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    model = fsdp(mesh, nn.Linear(6, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"local": torch.ones(2, 6)}
    wrong = distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)])
    wrong._local_tensor = torch.ones(3, 2)
    for value, text in (
        (partial, "x: a DTensor with the placement"),
        (optimizer, "the state 'local' of a sharded parameter"),
        (PerRank(wrong), "x: the local tensor of shape (3, 2) does not fit"),
        (PerRank(distribute_tensor(torch.ones(8), mesh, [Shard(0)])), "a distributed tensor inside PerRank"),
    ):
        with pytest.raises(StateError, match=re.escape(text)):
            flatten({"x": value})


@case
def quantized_state_is_cut_and_joined_where_blocks_end() -> None:
    """By four ranks and by one, into fresh optimizers on four, two by two, and one."""

    def build(mesh: DeviceMesh | None) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Linear(4, 8, bias=False)
        return (model if mesh is None else fsdp(mesh, model)), BlockSGD(model.parameters())

    for source in (mesh_of(4), None):
        model, optimizer = build(source)
        optimizer.step()
        stored = (save if source is None else gather)({"model": model, "optimizer": optimizer})
        assert stored.arrays[("optimizer", "state", "model.weight", "moment", 0, "scale"), None].shape == (8,)
        optimizer.step()
        for target in (mesh_of(4), mesh_of(2, 2), None):
            other, fresh = build(target)
            state = {"model": other, "optimizer": fresh}
            assert load(stored, state, rank=dist.get_rank(), world_size=4).complete
            ((moment,),) = ((items["moment"][0],) for items in fresh.state.values())
            assert isinstance(moment, Blocks if target is None else DTensor)
            fresh.step()
            assert np.array_equal(full(other.weight), full(model.weight))


@case
def a_quantized_tensor_that_cannot_be_cut_is_refused() -> None:
    mesh = mesh_of(4)
    one_row = spread(Blocks.of(torch.ones(1, 4)), distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    columns = spread(Blocks.of(torch.ones(8, 1)), distribute_tensor(torch.ones(8, 4), mesh, [Shard(1)]))
    for tensor, text in (
        (one_row, "x: a distributed blocks.Blocks can't be cut"),
        (columns, "along its first dimension"),
    ):
        with pytest.raises(StateError, match=text):
            flatten({"x": tensor})


@case
def a_mesh_of_some_ranks_leaves_the_others_without_parts() -> None:
    mesh = DeviceMesh("cpu", [1, 3])
    tensor = distribute_tensor(torch.arange(6.0), mesh, [Replicate()])
    (leaf,) = flatten({"x": tensor}).arrays
    assert leaf.placement is Placement.SHARDED
    assert len(leaf.parts) == (dist.get_rank() in (1, 3))
    assert all(region(part) == (slice(0, 6),) for part in leaf.parts)


def main() -> None:
    dist.init_process_group("gloo")
    results = {}
    for name, function in CASES.items():
        try:
            torch.manual_seed(1)
            function()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
    pathlib.Path(sys.argv[1], f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
