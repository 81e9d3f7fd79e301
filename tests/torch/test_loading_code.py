"""Modules with loading code of their own."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch
from state_memory import load, save
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver, PerChannelMinMaxObserver
from torch.nn.utils import parametrizations

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.state.tree import flatten


class Cached(nn.Module):
    """Computes something from its weight when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(3))
        self.cache, self.loads = self.w.detach() * 2, 0

    def remember(self, *_: Any) -> None:
        self.cache, self.loads = self.w.detach() * 2, self.loads + 1


class InLoadFrom(Cached):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.remember()


class InPostHook(Cached):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(lambda module, keys: module.remember())


class InPreHook(Cached):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self.take)

    def take(self, module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        self.cache, self.loads = state[prefix + "w"].detach() * 2, self.loads + 1


class InLoadStateDict(Cached):
    def load_state_dict(self, state: Any) -> Any:  # it knows no `strict`
        result = super().load_state_dict(state)
        self.remember()
        return result


class Replacing(Cached):
    """Makes a new parameter when it is loaded."""

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.w = nn.Parameter(state[prefix + "w"].detach().clone())
        self.remember()


CLASSES = [InLoadFrom, InPostHook, InPreHook, InLoadStateDict, Replacing]


@pytest.mark.parametrize("inner", [False, True], ids=["itself", "inside another"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_modules_loading_code_runs_once_after_the_fill_and_its_parameters_stay_themselves(
    kind: type[Cached], inner: bool
) -> None:
    if inner and kind is InLoadStateDict:
        pytest.skip("torch calls load_state_dict of the outermost module only")
    saved, fresh = kind(), kind()
    tied = nn.Module()
    tied.w = fresh.w
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    stored = save({"model": nn.Sequential(nn.Linear(2, 2), saved) if inner else saved})
    load(stored, {"model": nn.Sequential(nn.Linear(2, 2), fresh) if inner else fresh})
    assert torch.equal(fresh.w, saved.w)
    assert torch.equal(fresh.cache, saved.w.detach() * 2)
    assert fresh.loads == 1
    assert tied.w is fresh.w is optimizer.param_groups[0]["params"][0]


def quantized() -> nn.Module:
    """Return a module whose observers have no shape before they have seen data."""
    torch.manual_seed(5)
    observer = FakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    )
    return nn.ModuleDict({"linear": nn.Linear(4, 6), "fake": observer(), "plain": PerChannelMinMaxObserver()})


def run(module: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    out = module["fake"](module["linear"](torch.randn(3, 4)).T)
    module["plain"](out)
    return out


def test_observers_get_their_shapes_in_a_fresh_model() -> None:
    module = quantized()
    run(module, 1)
    stored = save({"model": module})
    fresh = quantized()
    assert fresh["fake"].scale.shape != module["fake"].scale.shape
    report = load(stored, {"model": fresh})
    assert report.complete
    for key, value in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert torch.equal(run(fresh, 2), run(module, 2))


class Packed(nn.Module):
    """Gives something more than it takes, as layers with packed weights do."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.w, self.offset = nn.Parameter(torch.ones(2)), torch.tensor(offset)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "w.offset"] = self.offset.clone()


def test_a_key_that_a_module_does_not_take_is_a_mismatch_and_not_loaded(caplog: Any) -> None:
    stored = save({"model": nn.Sequential(Packed(0.5))})
    load(stored, {"model": nn.Sequential(Packed(0.5))})  # what is there is what was saved
    with pytest.raises(LoadMismatchError, match=r"model: load_state_dict of .*Sequential did not take 0\.w\.offset"):
        load(stored, {"model": nn.Sequential(Packed(0.25))})
    with caplog.at_level(logging.WARNING, "ckptengine"):
        load(stored, {"model": nn.Sequential(Packed(0.25))}, strict=False)
    assert "did not take 0.w.offset" in caplog.text


def test_a_shape_that_the_code_does_not_take_is_named() -> None:
    wide = InLoadFrom()
    wide.w = nn.Parameter(torch.rand(5))
    stored = save({"model": wide})
    with pytest.raises(
        LoadMismatchError, match=r"(?s)model: load_state_dict of .*InLoadFrom refused.*size mismatch for w"
    ):
        load(stored, {"model": InLoadFrom()})
    fresh = InLoadFrom()
    before = fresh.w.detach().clone()
    load(stored, {"model": fresh}, strict=False)
    assert torch.equal(fresh.w, before)


def test_modules_with_torchs_own_code_alone_are_not_loaded_again(monkeypatch: Any) -> None:
    def made() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm1d(4),
            nn.InstanceNorm1d(4, affine=True),
            nn.MultiheadAttention(4, 2),
            parametrizations.weight_norm(nn.Linear(4, 4)),
            parametrizations.spectral_norm(nn.Linear(4, 4)),
            nn.utils.spectral_norm(nn.Linear(4, 4)),
        )

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("it was called")

    stored, fresh = save({"model": made()}), made()
    called.__module__ = nn.Module.__module__
    monkeypatch.setattr(nn.Module, "load_state_dict", called)
    assert load(stored, {"model": fresh}).complete


class Old(nn.Module):
    """Its `state_dict` knows no options."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.rand(3)), 2.0

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.w.detach(), "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"]


def test_a_module_whose_state_dict_knows_no_keep_vars_comes_back() -> None:
    module, fresh = Old(), Old()
    module.scale = 3.5
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.w.sum().backward()
    optimizer.step()
    stored = save({"model": module, "optimizer": optimizer})
    parameter = fresh.w
    load(stored, {"model": fresh, "optimizer": torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)})
    assert fresh.w is parameter
    assert torch.equal(fresh.w, module.w)
    assert fresh.scale == 3.5


def test_an_error_in_a_modules_state_dict_names_its_path() -> None:
    class Broken(nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("not now")

    with pytest.raises(StateError, match=r"nets\.0: state_dict\(\) of .*Broken raised ValueError: not now"):
        flatten({"nets": [Broken()]})


def test_what_has_nothing_to_save_is_told_once(tmp_path: Any, caplog: Any) -> None:
    state = {"model": nn.Linear(2, 2), "metrics": [nn.ReLU()], "scaler": torch.amp.GradScaler("cpu", enabled=False)}
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(tmp_path / "run", every=1) as checkpointer:
        checkpointer.restore(state)
        for step in range(1, 4):
            checkpointer.step(step, state)
            checkpointer.wait(60)
    told = [record.getMessage() for record in caplog.records if "nothing of" in record.getMessage()]
    assert len(told) == 1
    assert "metrics.0 (torch.nn.modules.activation.ReLU)" in told[0]
    assert "scaler (torch.amp.grad_scaler.GradScaler)" in told[0]


class Best:
    """Keeps the best weights so far, as early stopping does."""

    def __init__(self) -> None:
        self.weights: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


def test_kept_weights_still_say_their_versions() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), PerChannelMinMaxObserver())
    module(torch.rand(4, 3))
    best, fresh = Best(), Best()
    best.weights = copy.deepcopy(module.state_dict())
    load(save({"best": best}), {"best": fresh})
    assert type(fresh.weights) is OrderedDict
    assert fresh.weights._metadata == best.weights._metadata
    other = nn.Sequential(nn.BatchNorm1d(3), PerChannelMinMaxObserver())
    other.load_state_dict(fresh.weights)
    assert torch.equal(other[1].min_val, module[1].min_val)
