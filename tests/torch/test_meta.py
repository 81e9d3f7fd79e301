"""Models on the meta device: a restore gives them memory, says what it can't, and leaves nothing uninitialized."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptengine as ce
from ckptengine.errors import StateError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(3.0), persistent=False)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def trained(path: Path) -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ce.save(path, {"optimizer": optimizer, "model": net})
    return net, optimizer


def test_a_plain_module_gets_memory_as_the_same_parameters_and_the_optimizer_its_state_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, optimizer = trained(tmp_path / "saved")
    model = on_meta()
    fresh, parameters = torch.optim.AdamW(model.parameters()), list(model.parameters())
    with caplog.at_level(logging.WARNING, "ckptengine"):
        ce.load(tmp_path / "saved", into={"optimizer": fresh, "model": model})
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.embed.weight
    for (name, value), (_, wanted) in zip(model.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(value, wanted), name
    for a, b in zip(model.parameters(), net.parameters(), strict=True):
        assert torch.equal(fresh.state[a]["exp_avg"], optimizer.state[b]["exp_avg"])
        assert fresh.state[a]["exp_avg"].device == a.device
    assert model.angles.is_meta  # a forward pass fails: it does not compute with whatever memory had
    assert "model.angles: on the meta device, and not in the checkpoint" in caplog.text


def test_what_is_not_filled_stays_on_the_meta_device(tmp_path: Path) -> None:
    ce.save(tmp_path / "saved", {"model": nn.Linear(4, 3, bias=False)})
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    with pytest.raises(StateError, match="model.bias: tensor on the meta device has no memory.*to_empty"):
        ce.load(tmp_path / "saved", into={"model": model}, strict=False)
    assert model.bias.is_meta


def test_a_save_of_a_module_on_the_meta_device_is_refused_with_the_way_that_works(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"on the meta device has no memory.*`model.to_empty\(device=…\)`"):
        ce.save(tmp_path / "saved", {"model": on_meta()})
