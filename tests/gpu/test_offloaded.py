"""Moments that are kept on the CPU while the model is on the device, and the reverse."""

from pathlib import Path
from typing import Any

import torch

import ckptengine as ce


def trained(place: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(30, 20).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def move(optimizer: torch.optim.Optimizer, place: str) -> None:
    for state in optimizer.state.values():
        state.update({key: value.to(place) for key, value in state.items() if key != "step"})


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for _, value in sorted(state.items())]


def values(tensors: Any) -> list[list[Any]]:
    return [one.detach().cpu().tolist() for one in tensors]


def test_moments_come_back_where_they_are_kept_or_where_the_parameter_lies(tmp_path: Path, device: Any) -> None:
    model, optimizer = trained(device.name, 0)
    move(optimizer, "cpu")  # between two steps, as an off-loading loop does
    with ce.Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model, "optimizer": optimizer}).durable.result()
        move(optimizer, device.name)
        step(model, optimizer)
        move(optimizer, "cpu")
        run.save(2, {"model": model, "optimizer": optimizer}).durable.result()
    expected = values(moments(optimizer))

    for kept in ("cpu", device.name):
        other, its = trained(device.name, 1)
        move(its, kept)
        ce.load(tmp_path / "run", into={"model": other, "optimizer": its})
        assert values(moments(its)) == expected
        assert {one.device.type for one in moments(its) if one.dim()} == {torch.device(kept).type}
        assert all(parameter.device.type == torch.device(device.name).type for parameter in other.parameters())

    fresh = torch.nn.Linear(30, 20).to(device.name)
    its = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    ce.load(tmp_path / "run", into={"model": fresh, "optimizer": its})
    assert values(moments(its)) == expected
    assert {one.device.type for one in moments(its) if one.dim()} == {torch.device(device.name).type}
    assert values(fresh.parameters()) == values(model.parameters())
