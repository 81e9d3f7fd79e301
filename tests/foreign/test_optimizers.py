"""Optimizers are filled from what torch's own ways to save them wrote, whatever names their parameters have there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign_models import model, same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import ckptengine as ce
from ckptengine.errors import LoadMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(seed: int, steps: int = 1, kind: Any = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = model(seed)
    parameters = list(net.parameters())
    groups = [{"params": parameters[:2], "lr": 0.1 * seed}, {"params": parameters[2:]}]
    optimizer = kind(groups, lr=0.01 * seed)
    for _ in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, float(seed + number))
        optimizer.step()
    return net, optimizer


def write(way: str, path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    if way == "torch.save":
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    elif way == "our save of state dicts":
        ce.save(path, {"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    elif way == "DCP of state dicts":
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.save(state, checkpoint_id=path, no_dist=True)
    else:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path, no_dist=True)
    return path


WAYS = ["torch.save", "our save of state dicts", "DCP of state dicts", "DCP of get_state_dict"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 2], ids=["into a fresh one", "into one that has trained"])
def test_an_optimizer_goes_on_where_it_was(tmp_path: Path, way: str, steps: int) -> None:
    net, optimizer = trained(1)
    path = write(way, tmp_path / "c.pt", net, optimizer)
    other, filled = trained(2, steps)
    assert ce.load(path, into={"model": other, "optimizer": filled}).complete
    same(other.state_dict(), net.state_dict())
    same(filled.state_dict(), optimizer.state_dict())
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        one.grad, two.grad = torch.ones_like(one), torch.ones_like(two)
    optimizer.step()
    filled.step()
    same(other.state_dict(), net.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_other_groups_are_an_error_that_names_them(tmp_path: Path, way: str) -> None:
    path = write(way, tmp_path / "c.pt", *trained(1))
    net = model(2)
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(LoadMismatchError, match="1 parameter groups here, 2 in the checkpoint"):
        ce.load(path, into={"model": net, "optimizer": optimizer})


def test_another_order_of_parameters_shows_in_their_shapes(tmp_path: Path) -> None:
    path = write("torch.save", tmp_path / "c.pt", *trained(1))
    net = model(2)
    parameters = list(net.parameters())[::-1]
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}])
    with pytest.raises(LoadMismatchError, match="state of a parameter of shape"):
        ce.load(path, into={"model": net, "optimizer": optimizer})


def test_a_name_that_could_mean_two_parameters_is_an_error(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    net = Two()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    group = {**optimizer.state_dict()["param_groups"][0], "params": ["weight", "b.weight"]}
    state = {"state": {}, "param_groups": [group]}
    torch.save({"optimizer": state}, tmp_path / "c.pt")
    with pytest.raises(LoadMismatchError, match="group 0 has other parameters in the checkpoint"):
        ce.load(tmp_path / "c.pt", into={"model": net, "optimizer": optimizer}, only=["optimizer"])
