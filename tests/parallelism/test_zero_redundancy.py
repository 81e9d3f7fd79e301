"""ZeroRedundancyOptimizer whose parameters change: what this rank has is looked up anew at each load."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(value: float) -> tuple[nn.Module, ZeroRedundancyOptimizer]:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return model, optimizer


def replace(model: nn.Module, optimizer: ZeroRedundancyOptimizer, *, inside: bool) -> nn.Parameter:
    """Put another parameter in the place of `b.weight`, as who resizes or prunes a layer does."""
    old, new = model["b"].weight, nn.Parameter(torch.zeros(2, 3))
    model["b"].weight = new
    for one in (optimizer, optimizer.optim) if inside else (optimizer,):
        for group in one.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.optim.state.pop(old, None)
    optimizer.state.pop(old, None)
    return new


def test_a_parameter_that_has_taken_the_place_of_another_gets_its_state(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    ce.save(tmp_path / "saved", {"model": model, "optimizer": optimizer})
    expected = optimizer.optim.state[model["b"].weight]["exp_avg"].clone()
    fresh, other = trained(2.0)
    ce.load(tmp_path / "saved", into={"model": fresh, "optimizer": other})
    new = replace(fresh, other, inside=True)
    ce.load(tmp_path / "saved", into={"model": fresh, "optimizer": other})
    assert torch.equal(other.optim.state[new]["exp_avg"], expected)


def test_state_of_a_parameter_that_no_rank_steps_is_unexpected(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    ce.save(tmp_path / "saved", {"model": model, "optimizer": optimizer})
    fresh, other = trained(2.0)
    replace(fresh, other, inside=False)
    with pytest.raises(LoadMismatchError, match=r"unexpected in the checkpoint:\n +optimizer.state.model.b.weight"):
        ce.load(tmp_path / "saved", into={"model": fresh, "optimizer": other})


def test_lbfgs_inside_is_refused_since_its_state_is_of_all_parameters_of_a_rank(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.LBFGS)
    with pytest.raises(StateError, match="LBFGS without ZeroRedundancyOptimizer"):
        ce.save(tmp_path / "saved", {"model": model, "optimizer": optimizer})
