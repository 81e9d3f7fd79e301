"""One of four ranks under gloo: proves layout by layout that boxes and tensors agree; torchrun starts it.

Writes one JSON file for each rank: case name → "ok" or a traceback.
"""

from __future__ import annotations

import functools
import json
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from blocks import Blocks, BlockSGD, spread
from state_memory import Stored, load, read_part, region, save
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import Placement
from ckptengine.state.bind import Saved, SavedLeaf
from ckptengine.state.outline import decode_outline
from ckptengine.state.per_rank import PerRank
from ckptengine.state.tree import flatten

CASES: dict[str, Callable[[], None]] = {}
SHAPES = [(1, 5), (3, 2), (8, 4), (10, 3), (7, 10)]


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def gather(state: dict[str, Any], outlined: bool = False) -> Stored:
    """Return all ranks' boxes as whole arrays; every element must be there, and replicas must agree."""
    flat = flatten(state)
    mine = {
        leaf.path: [(part.box, read_part(part, leaf.dtype).tobytes()) for part in leaf.parts] for leaf in flat.arrays
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    arrays, leaves = {}, {}
    for leaf in flat.arrays:
        dtype = DTYPES[leaf.dtype].numpy
        whole, seen = np.zeros(leaf.shape, dtype), np.zeros(leaf.shape, bool)
        for parts in everyone:
            own = np.zeros(leaf.shape, int)
            for box, data in parts[leaf.path]:
                where = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
                values = np.frombuffer(data, dtype).reshape(box.shape)
                assert box.volume > 0
                assert not (seen[where] & (whole[where] != values)).any(), f"{leaf.path}: replicas differ"
                own[where] += 1
                whole[where], seen[where] = values, True
            assert own.max(initial=0) <= 1, f"{leaf.path}: one rank's boxes overlap"
        assert seen.all(), f"{leaf.path}: not covered"
        arrays[leaf.path, None] = whole
        leaves[leaf.path] = SavedLeaf(leaf.dtype, leaf.shape, leaf.placement, leaf.container)
    outline = decode_outline(flat.outline.encoded, len(leaves)) if outlined else None
    saved = Saved(dist.get_world_size(), leaves, flat.values, flat.aliases, flat.containers, outline=outline)
    return Stored(saved, arrays)


def full(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().numpy()


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


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


class Net(nn.Module):
    """Sizes that no number of ranks divides; the last has fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(6, 10)
        self.tied.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.tanh(self.up(x)) + self.tied(x)))


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, hidden), nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def check_module(model: nn.Module) -> None:
    stored = gather({"model": model})
    for key, tensor in model.state_dict().items():
        path = ("model", key)
        assert np.array_equal(stored.arrays[stored.saved.aliases.get(path, path), None], full(tensor)), key


def fsdp(mesh: DeviceMesh, model: nn.Module, **options: Any) -> nn.Module:
    fully_shard(model, mesh=mesh, **options)
    return model


def fsdp_tp(hidden: int) -> nn.Module:
    mesh = mesh_of(2, 2)
    model = Block(hidden)
    parallelize_module(model, mesh["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fsdp(mesh["a"], model)


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


def trained(model: nn.Module, make: Callable[..., torch.optim.Optimizer], steps: int) -> torch.optim.Optimizer:
    optimizer = make(model.parameters())
    for _ in range(steps):
        model(torch.linspace(-1, 1, 24).reshape(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@case
def saving_changes_no_sharded_optimizer() -> None:
    for steps in (0, 1):
        model = fsdp(mesh_of(4), Net())
        optimizer = trained(model, torch.optim.AdamW, steps)
        before = [full(t).copy() for t in model.state_dict().values()]
        flatten({"model": model, "optimizer": optimizer})
        assert len(optimizer.state) == steps * len(list(model.parameters()))
        assert all(np.array_equal(a, full(b)) for a, b in zip(before, model.state_dict().values(), strict=True))


@case
def optimizers_are_created_on_another_layout() -> None:
    source = fsdp_tp(10)
    stored = gather({"model": source, "optimizer": trained(source, torch.optim.AdamW, 2)})
    for target in (fsdp(mesh_of(4), Block(10)), fsdp(mesh_of(2, 2), Block(10)), fsdp_tp(10), Block(10)):
        fresh = torch.optim.AdamW(target.parameters())
        state = {"model": target, "optimizer": fresh}
        assert load(stored, state, rank=dist.get_rank()).complete
        again = gather(state)
        assert again.arrays.keys() == stored.arrays.keys()
        for key, array in stored.arrays.items():
            assert np.array_equal(again.arrays[key], array), key
        for parameter, items in fresh.state.items():
            assert type(items["step"]) is torch.Tensor
            assert type(items["exp_avg"]) is type(parameter.data)
            if isinstance(parameter, DTensor):
                assert items["exp_avg"].placements == parameter.placements
        target(torch.ones(4, 6)).square().sum().backward()
        fresh.step()


@case
def state_of_other_shapes_is_distributed_like_the_parameter() -> None:
    mesh = mesh_of(4)

    def build(rows: float) -> dict[str, Any]:
        model = fsdp(mesh, nn.Linear(6, 10, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if rows:
            state = optimizer.state[model.weight]
            state["row"] = distribute_tensor(torch.arange(10.0)[:, None] * rows, mesh, [Shard(0)])
            state["column"] = distribute_tensor(torch.arange(6.0)[None] * rows, mesh, [Replicate()])
            state["flat"] = distribute_tensor(torch.arange(5.0) * rows, mesh, [Shard(0)])
        return {"model": model, "optimizer": optimizer}

    stored, target = gather(build(2)), build(0)
    assert load(stored, target, rank=dist.get_rank()).complete
    (state,) = target["optimizer"].state.values()
    assert state["row"].placements == (Shard(0),)
    assert state["column"].placements == state["flat"].placements == (Replicate(),)
    again = gather(target)
    assert all(np.array_equal(again.arrays[key], array) for key, array in stored.arrays.items())


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
def local_state_of_a_sharded_parameter_is_refused_at_any_depth() -> None:
    model = fsdp(mesh_of(4), nn.Linear(6, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = distribute_tensor(torch.ones(8, 2), mesh_of(4), [Shard(0)])
    for value, where in (
        ([rows, torch.ones(2, 6)], "blocks.1"),
        ({"left": (rows, {3: torch.ones(2)})}, "blocks.left.1.3"),
        ([np.ones(5)], "blocks.0"),
    ):
        optimizer.state[model.weight] = {"blocks": value}
        with pytest.raises(StateError, match=f"the state {where!r} of a sharded parameter of shape"):
            flatten({"optimizer": optimizer})
    optimizer.state[model.weight] = {"blocks": [rows, {"step": torch.tensor(3.0)}]}
    assert [leaf.placement for leaf in flatten({"optimizer": optimizer}).arrays] == [
        Placement.SHARDED,
        Placement.REPLICATED,
    ]


class Keeper:
    """An object around an optimizer, as trainers have it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["inner"])


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[np.ndarray[Any, Any]]:
    model(torch.linspace(-1, 1, 24).reshape(4, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [full(parameter) for parameter in model.parameters()]


def held(kind: str, optimizer: torch.optim.Optimizer) -> Any:
    return {"object": Keeper, "dict": torch.optim.Optimizer.state_dict}[kind](optimizer)


@case
def state_that_has_no_counterpart_yet_is_made_like_its_parameter() -> None:
    """In an object and in a plain dict, from sharded and from plain parameters, into a fresh optimizer."""
    for kind in ("object", "dict"):
        for one_rank in (False, True):
            model: nn.Module = Block(10) if one_rank else fsdp(mesh_of(4), Block(10))
            optimizer = trained(model, torch.optim.AdamW, 2)
            stored = (save if one_rank else gather)({"model": model, "held": held(kind, optimizer)})
            expected = one_step(model, optimizer)
            target = fsdp(mesh_of(4), Block(10))
            fresh = torch.optim.AdamW(target.parameters())
            state = {"model": target, "held": held(kind, fresh)}
            assert load(stored, state, rank=dist.get_rank(), world_size=4).complete
            if kind == "dict":
                fresh.load_state_dict(state["held"])
            for parameter, items in fresh.state.items():
                assert items["exp_avg"].placements == parameter.placements  # type: ignore[attr-defined]
                assert items["exp_avg"].to_local().shape == parameter.to_local().shape  # type: ignore[attr-defined]
                assert type(items["step"]) is torch.Tensor
            # One rank multiplies in another order than four: not to the last bit.
            close = functools.partial(np.allclose, atol=1e-6) if one_rank else np.array_equal
            assert all(close(a, b) for a, b in zip(expected, one_step(target, fresh), strict=True)), kind


@case
def state_of_a_fresh_optimizer_is_spread_as_the_saved_one_was() -> None:
    """A plain tensor, a replicated and a sharded one, of shapes that suggest something else."""

    def made(with_state: bool) -> dict[str, Any]:
        mesh, model = mesh_of(4), nn.Linear(6, 8, bias=False)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if with_state:
            optimizer.state[model.weight] = {
                "plain": torch.full((1,), 3.0),
                "whole": distribute_tensor(torch.arange(48.0).reshape(8, 6), mesh, [Replicate()]),
                "number": distribute_tensor(torch.tensor(5.0), mesh, [Replicate()]),
                "longer": distribute_tensor(torch.arange(20.0), mesh, [Shard(0)]),
                "usual": distribute_tensor(torch.arange(48.0).reshape(8, 6), mesh, [Shard(0)]),
            }
        return {"model": model, "optimizer": optimizer}

    source, target = made(True), made(False)
    flat = flatten(source)
    assert {path[-1]: how for path, how in flat.outline.spreads.items()} == {
        "plain": "plain",
        "whole": "replicated",
        "number": "replicated",
        "longer": "parameter",
    }
    assert load(gather(source, outlined=True), target, rank=dist.get_rank()).complete
    (expected,), (state,) = (one["optimizer"].state.values() for one in (source, target))
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert type(state[key]) is type(tensor), key
        assert getattr(state[key], "placements", None) == getattr(tensor, "placements", None), key
        assert np.array_equal(full(state[key]), full(tensor)), key


@case
def an_empty_state_of_a_sharded_parameter_comes_back_and_no_state_as_none() -> None:
    def made() -> dict[str, Any]:
        model = fsdp(mesh_of(4), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)))
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    source, target = made(), made()
    source["optimizer"].state.update({parameter: {} for parameter in source["model"][1].parameters()})
    assert load(gather(source, outlined=True), target, rank=dist.get_rank()).complete
    assert target["optimizer"].state_dict()["state"] == {2: {}, 3: {}}


@case
def nested_state_of_a_fresh_optimizer_is_made_like_its_parameter() -> None:
    model = fsdp(mesh_of(4), Block(10))
    optimizer = trained(model, torch.optim.SGD, 1)
    for parameter in model.parameters():
        moments = parameter.detach().clone()
        optimizer.state[parameter] = {"blocks": [moments, {"deep": (moments + 1, torch.tensor(2.0))}]}
    stored = gather({"model": model, "optimizer": optimizer})
    for target in (fsdp(mesh_of(2, 2), Block(10)), Block(10)):
        fresh = torch.optim.SGD(target.parameters())
        state = {"model": target, "optimizer": fresh}
        assert load(stored, state, rank=dist.get_rank()).complete
        for parameter, items in fresh.state.items():
            first, deep = items["blocks"][0], items["blocks"][1]["deep"]
            assert type(first) is type(deep[0]) is type(parameter.data)
            if isinstance(parameter, DTensor):
                assert first.placements == deep[0].placements == parameter.placements
            assert np.array_equal(full(first), full(parameter))
            assert np.array_equal(full(deep[0]), full(parameter) + 1)
            assert type(deep[1]) is torch.Tensor


@case
def what_nothing_tells_how_to_spread_is_a_mismatch() -> None:
    model = fsdp_tp(6)
    optimizer = trained(model, torch.optim.AdamW, 1)
    stored = gather({"model": model, "held": held("dict", optimizer)})
    square = fsdp_tp(6)
    for value, text in (
        ({"held": None}, "held.state.0.exp_avg: was spread over the ranks .* nothing in the state tells"),
        ({"model": nn.Linear(1, 1), "held": None}, ""),
    ):
        only = {"only": ["held"]}
        if text:
            with pytest.raises(LoadMismatchError, match=text):
                load(stored, value, rank=dist.get_rank(), **only)
        else:  # the job spreads nothing: every rank has the whole
            load(stored, value, rank=dist.get_rank(), **only)
            assert value["held"]["state"][0]["exp_avg"].shape == model.up.weight.shape
    square.twin = distribute_tensor(torch.zeros(6, 6), mesh_of(4), [Shard(1)])
    state = {"model": square, "twin": square.twin, "held": held("dict", torch.optim.AdamW(square.parameters()))}
    with pytest.raises(LoadMismatchError, match="have its shape .* spread in different ways"):
        load(stored, state, rank=dist.get_rank(), only=["held"])


@case
def an_optimizer_that_stays_fresh_is_told() -> None:
    model = fsdp(mesh_of(4), Block(10))
    optimizer = trained(model, torch.optim.AdamW, 1)
    stored = gather({"model": model, "held": held("dict", optimizer)})
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckptengine").addHandler(handler)
    try:
        for fresh in (True, False):
            said.clear()
            source = torch.optim.AdamW(model.parameters()) if fresh else optimizer
            load(stored, {"model": model, "held": held("dict", source)}, rank=dist.get_rank())
            told = [
                line for line in said if line.startswith("held: this is what the optimizer's state_dict() returned")
            ]
            assert len(told) == (fresh and dist.get_rank() == 0), said
    finally:
        logging.getLogger("ckptengine").removeHandler(handler)


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
