from __future__ import annotations

import logging
import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from state_memory import load, save
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.schema.leaf import Placement
from ckptengine.state.per_rank import PerRank
from ckptengine.state.tree import flatten


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Extra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.w, self.extra = nn.Parameter(torch.zeros(2)), extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Hooked(nn.Module):
    """Its state is not its tensors: what was saved must go back through its own calls."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "doubled"] = self.w.detach() * 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        with torch.no_grad():
            self.w.copy_(state_dict[prefix + "doubled"] / 2)


def test_a_module_gives_parameters_buffers_and_tied_weights_once() -> None:
    flat = flatten({"model": Tied()})
    assert {leaf.path[1]: leaf.placement for leaf in flat.arrays} == {
        "embed.weight": Placement.REPLICATED,
        "norm.weight": Placement.REPLICATED,
        "norm.bias": Placement.REPLICATED,
        "norm.running_mean": Placement.WHOLE,
        "norm.running_var": Placement.WHOLE,
        "norm.num_batches_tracked": Placement.WHOLE,
    }
    assert flat.aliases == {("model", "head.weight"): ("model", "embed.weight")}
    assert {leaf.placement for leaf in flatten({"m": PerRank(Tied())}).arrays} == {Placement.PER_RANK}


def test_a_module_is_filled_in_place() -> None:
    source, target = Tied(), Tied()
    source.norm(torch.randn(4, 3))
    weight = target.embed.weight
    assert load(save({"model": source}), {"model": target}).complete
    assert target.embed.weight is weight is target.head.weight
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


def test_an_untied_checkpoint_key_fills_the_tied_weight() -> None:
    source, target = Tied(), Tied()
    stored = save({"model": OrderedDict((k, v) for k, v in source.state_dict().items() if "embed" not in k)})
    assert load(stored, {"model": target}).complete
    assert torch.equal(target.embed.weight, source.embed.weight)


def bare() -> nn.Module:
    return nn.Sequential(OrderedDict(module=nn.Linear(2, 2), b=nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))


def wrapped_inside() -> nn.Module:
    model = bare()
    model.b[0] = checkpoint_wrapper(torch.compile(model.b[0]))  # type: ignore[index, operator, assignment]
    return model


@pytest.mark.parametrize(
    "wrap",
    [lambda m: torch.compile(m), lambda m: nn.DataParallel(m), lambda m: nn.DataParallel(torch.compile(m))],
)
@pytest.mark.parametrize("make", [bare, wrapped_inside])
def test_wrappers_leave_no_trace_in_the_names(wrap: Any, make: Any) -> None:
    plain = [leaf.path for leaf in flatten({"model": bare()}).arrays]
    assert [leaf.path for leaf in flatten({"model": wrap(make())}).arrays] == plain
    source, target = bare(), wrap(make())
    assert load(save({"model": source}), {"model": target}).complete
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_that_collide_without_wrappers_are_refused() -> None:
    model = nn.Module()
    model._orig_mod = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(StateError, match=r"'weight' and '_orig_mod\.weight' are called 'weight'"):
        flatten({"model": model})


@pytest.mark.parametrize("extra", [{"step": 1, "scale": torch.ones(2)}, torch.arange(3), "text", 3, (1, 2)])
def test_extra_state_goes_back_through_the_module(extra: Any) -> None:
    source, target = nn.Sequential(Extra(extra)), nn.Sequential(Extra(None))
    source[0].w.data.fill_(5)
    flat = flatten({"m": source})
    where = {leaf.path[1] for leaf in flat.arrays} | {path[1] for path in flat.values}
    assert where == {"0.w", "0._extra_state"}
    assert load(save({"m": source}), {"m": target}).complete
    if isinstance(extra, dict):
        assert target[0].extra.keys() == extra.keys()
        extra, target[0].extra = extra["scale"], target[0].extra["scale"]
    assert str(target[0].extra) == str(extra)
    assert target[0].w.tolist() == [5, 5]


def test_what_a_modules_hooks_make_goes_back_through_them() -> None:
    source, target = nn.Sequential(Hooked(), nn.Linear(1, 1)), nn.Sequential(Hooked(), nn.Linear(1, 1))
    source[0].w.data.copy_(torch.arange(3.0))
    assert load(save({"m": source}), {"m": target}).complete
    assert target[0].w.tolist() == [0, 1, 2]
    assert torch.equal(target[1].weight, source[1].weight)


def test_what_does_not_fit_is_named_in_full() -> None:
    stored = save({"model": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))})
    target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(5, 1, bias=False))
    with pytest.raises(LoadMismatchError) as caught:
        load(stored, {"model": target})
    for text in (
        "model.1.weight: shape (5, 3) here, (4, 3)",
        "model.1.bias: shape (5,)",
        "  model.2.weight\n",
    ):
        assert text in str(caught.value)
    report = load(stored, {"model": target}, strict=False)
    assert report.loaded == ("model.0.weight", "model.0.bias")


def test_parts_of_a_module_are_chosen_and_renamed() -> None:
    source, target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), nn.Module()
    target.body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    stored = save({"net": source})
    report = load(stored, {"model": target}, rename={"net": "model.body"}, only=["model.body.1"])
    assert report.loaded == ("model.body.1.weight", "model.body.1.bias")
    assert torch.equal(target.body[1].weight, source[1].weight)
    assert load(stored, {"model": target}, rename={"net": "model.body"}).complete
    assert torch.equal(target.body[0].weight, source[0].weight)


class Best:
    """Keeps a copy of the best weights, as early stopping does."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


def test_a_modules_state_that_an_object_holds_keeps_its_versions() -> None:
    model = nn.BatchNorm1d(2)
    best = Best(model.state_dict())
    versions = best.weights._metadata
    assert load(save({"best": Best(nn.BatchNorm1d(2).state_dict())}), {"best": best}).complete
    assert best.weights._metadata == versions
    assert best.weights._metadata[""] == {"version": 2}


def test_a_metric_that_leaves_its_values_out_of_its_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metric(nn.Module):
        """What torchmetrics' class has, as far as it matters here."""

        def __init__(self, persistent: bool) -> None:
            super().__init__()
            self._persistent, self._defaults = {"total": persistent}, {"total": torch.zeros(())}
            self.register_buffer("total", torch.zeros(()), persistent=persistent)

    monkeypatch.setitem(sys.modules, "torchmetrics", types.SimpleNamespace(Metric=Metric))
    with pytest.raises(StateError, match=r"m\.1: Metric leaves its values out.*persistent\(True\)"):
        flatten({"m": nn.Sequential(nn.Linear(2, 2), Metric(persistent=False))})
    flatten({"m": nn.Sequential(nn.Linear(2, 2), Metric(persistent=True))})


class CountingMetric(nn.Module):
    """What torchmetrics' class does, as far as it matters here: its values are copied into its `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self._persistent, self._defaults = {"total": True}, {"total": torch.zeros(2)}
        self.total, self._update_count, self._computed = torch.zeros(2), 0, None

    def update(self, value: float) -> None:
        self.total, self._update_count, self._computed = self.total + value, self._update_count + 1, None

    def compute(self) -> torch.Tensor:
        if self._computed is None:
            self._computed = self.total / self._update_count
        return self._computed

    def state_dict(self, *args, **options):
        state = super().state_dict(*args, **options)
        state[f"{options.get('prefix', '')}total"] = self.total.detach().clone()
        return state

    def _load_from_state_dict(self, state, prefix, *rest):
        self.total = state.pop(f"{prefix}total", self.total)
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_metric_goes_on_from_its_number_of_updates_and_forgets_what_it_had_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", types.SimpleNamespace(Metric=CountingMetric))
    model = nn.Sequential(nn.Linear(2, 2), CountingMetric())
    model[1].update(2.0)
    model[1].update(4.0)
    saved = save({"m": model})
    fresh = nn.Sequential(nn.Linear(2, 2), CountingMetric())
    fresh[1].update(100.0)
    fresh[1].compute()
    load(saved, {"m": fresh})
    assert fresh[1]._update_count == 2
    assert fresh[1].compute().tolist() == [3.0, 3.0]


def test_a_metric_of_an_older_checkpoint_without_counts_is_loaded_and_told(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torchmetrics", types.SimpleNamespace(Metric=CountingMetric))
    model = nn.Sequential(nn.Linear(2, 2), CountingMetric())
    model[1].update(2.0)
    stored = save({"m": model})
    (count,) = (path for path in stored.saved.values if path[-1] == "1._update_count")
    del stored.saved.values[count]
    fresh = nn.Sequential(nn.Linear(2, 2), CountingMetric())
    with caplog.at_level(logging.WARNING, "ckptengine"):
        report = load(stored, {"m": fresh})
    assert report.complete
    assert fresh[1].total.tolist() == [2.0, 2.0]
    assert "m.1._update_count: not in the checkpoint, which an earlier version has saved without it" in caplog.text
    # A checkpoint without the metric has not been saved by an earlier version, but from another model.
    other = save({"m": nn.Sequential(nn.Linear(2, 2))})
    with pytest.raises(LoadMismatchError, match=r"missing[^?]*m\.1\._update_count"):
        load(other, {"m": fresh})


def test_the_values_of_a_metric_are_not_taken_from_rank_0_as_buffers_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", types.SimpleNamespace(Metric=CountingMetric))
    placements = {leaf.path[-1]: leaf.placement for leaf in flatten({"m": CountingMetric()}).arrays}
    assert placements == {"total": Placement.REPLICATED}  # so that ranks with different ones are refused


def test_weights_that_bitsandbytes_has_quantized_to_4_bits_are_refused_at_the_save():
    class Linear4bit(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"
        quant_state = None

    model = nn.Sequential(Linear4bit(2, 2))
    flatten({"m": model})
    model[0].quant_state = object()
    with pytest.raises(StateError, match=r"m\.0: the `quant_state` of bitsandbytes' Linear4bit.*requires_grad"):
        flatten({"m": model})
