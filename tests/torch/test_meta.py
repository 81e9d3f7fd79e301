"""Models on the meta device: a restore gives them memory, says what it can't, and leaves nothing uninitialized."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_ranks import Ranks
from torch import nn

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, DeviceError, LoadMismatchError, RankFailedError, StateError


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


def test_merged_chunks_of_a_pipeline_get_memory_and_their_buffers_without_any_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = nn.ModuleDict({"first": Net(), "last": Net()})
    ce.save(tmp_path / "saved", {"model": whole})
    with torch.device("meta"):
        chunks = [nn.ModuleDict({name: Net()}) for name in whole]
    with caplog.at_level(logging.WARNING, "ckptengine"):
        ce.load(tmp_path / "saved", into={"model": ce.Merged(chunks)})
    for chunk in chunks:
        for name, value in chunk.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name
    assert "model.first.angles, model.last.angles: on the meta device" in caplog.text


def meta_linear(**options: Any) -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(4, 3, **options)


def is_all_meta(model: nn.Module) -> bool:
    return all(one.is_meta for one in (*model.parameters(), *model.buffers()))


def test_what_is_not_filled_stays_on_the_meta_device(tmp_path: Path) -> None:
    ce.save(tmp_path / "saved", {"model": nn.Linear(4, 3, bias=False)})
    model = meta_linear()
    report = ce.load(tmp_path / "saved", into={"model": model}, strict=False)
    assert report.missing == ("model.bias",)
    assert model.bias.is_meta
    assert not model.weight.is_meta


@pytest.mark.parametrize(
    ("saved", "wrong"),
    [
        (nn.Linear(4, 5), r"model.weight: shape \(3, 4\) here, \(5, 4\) in the checkpoint"),
        (nn.Linear(4, 3).double(), "model.weight: dtype float32 here, float64 in the checkpoint"),
        (nn.Linear(4, 3, bias=False), "model.bias"),
        (nn.Sequential(nn.Linear(4, 3)), "missing"),
    ],
)
def test_what_does_not_fit_is_named_as_anywhere_else_and_the_model_stays_on_the_meta_device(
    tmp_path: Path, saved: nn.Module, wrong: str
) -> None:
    ce.save(tmp_path / "saved", {"model": saved})
    model = meta_linear()
    weight = model.weight
    with pytest.raises(LoadMismatchError, match=wrong):
        ce.load(tmp_path / "saved", into={"model": model})
    assert is_all_meta(model)
    assert model.weight is weight


def test_a_load_that_fails_in_the_middle_leaves_a_model_on_the_meta_device_that_a_later_load_fills(
    tmp_path: Path,
) -> None:
    net, _ = trained(tmp_path / "saved")
    (archive,) = (tmp_path / "saved").rglob("rank-00000.zarr.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    model = on_meta()
    optimizer, parameters = torch.optim.AdamW(model.parameters()), list(model.parameters())
    with pytest.raises(CheckpointDamagedError):
        ce.load(tmp_path / "saved", into={"optimizer": optimizer, "model": model})
    assert is_all_meta(model)
    archive.write_bytes(whole)
    ce.load(tmp_path / "saved", into={"optimizer": optimizer, "model": model})
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in model.state_dict().items())


def test_without_memory_for_all_of_a_model_it_stays_on_the_meta_device_and_the_first_tensor_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = trained(tmp_path / "saved")
    model, empty_like, asked = on_meta(), torch.empty_like, []

    def refuse(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append(tensor)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("tried to allocate 16 bytes")
        return empty_like(tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", refuse)
        with pytest.raises(DeviceError, match=r"rank 0: .*saved: model\.norm\.\w+: there is no memory .*Nothing of"):
            ce.load(tmp_path / "saved", into={"model": model}, only=["model"])
    assert is_all_meta(model)
    ce.load(tmp_path / "saved", into={"model": model}, only=["model"])
    assert torch.equal(model.norm.weight, net.norm.weight)


def test_what_another_rank_does_not_fit_leaves_this_rank_s_model_on_the_meta_device(tmp_path: Path) -> None:
    ce.save(tmp_path / "saved", {"model": nn.Linear(4, 3)})
    models: list[nn.Module] = [meta_linear(), nn.Linear(4, 5)]
    ranks = Ranks(2)

    def load(rank: int) -> None:
        with pytest.raises((LoadMismatchError, RankFailedError)):
            ce.load(tmp_path / "saved", into={"model": models[rank]}, comm=ranks.comms[rank], timeout=20)

    ranks.run(load)
    ranks.end()
    assert is_all_meta(models[0])


def test_a_parameter_that_cannot_go_back_to_the_meta_device_holds_nan_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ce.save(tmp_path / "saved", {"model": nn.Linear(4, 3)})
    model, held = meta_linear(), []

    def fail(*_: Any) -> None:
        held.append(model.weight.view(-1))
        raise OSError("no")

    monkeypatch.setattr(sys.modules["ckptengine.load.loader"], "_fill", fail)
    with pytest.raises(OSError, match="no"):
        ce.load(tmp_path / "saved", into={"model": model})
    assert model.weight.isnan().all()
    assert model.bias.is_meta
    assert "model.weight: given memory by a restore that failed" in caplog.text


def test_a_save_of_a_module_on_the_meta_device_is_refused_with_the_way_that_works(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"on the meta device has no memory.*`model.to_empty\(device=…\)`"):
        ce.save(tmp_path / "saved", {"model": on_meta()})
