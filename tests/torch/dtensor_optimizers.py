"""Cases of `dtensor_worker.py`: optimizers of split parameters, and what keeps state for them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dtensor_cases import Block, Net, case, fsdp, fsdp_tp, full, gather, mesh_of
from state_memory import load, save
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.schema.leaf import Placement
from ckptengine.state.tree import flatten


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
