"""`rename` by prefixes, patterns, regular expressions and functions, for checkpoints of ours and of others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign_models import same
from torch import nn

import ckptengine as ce
from ckptengine.errors import LoadMismatchError
from ckptengine.state.rename import renamer


@pytest.fixture(params=["ours", "safetensors"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A GPT-like set of names, saved by us as one dict and by safetensors."""
    names = ["h.0.attn.w", "h.0.mlp.w", "h.1.attn.w", "h.1.mlp.w", "h.10.attn.w", "h.10.mlp.w", "ln.w"]
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    if request.param == "ours":
        ce.save(tmp_path / "c", tensors)
        return tmp_path / "c"
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def values(loaded: Any) -> dict[str, float]:
    """Return the first number of each tensor by its dotted name."""
    found: dict[str, float] = {}

    def look(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                look(item, f"{name}.{key}" if name else str(key))
        else:
            found[name] = float(value[0])

    look(loaded, "")
    return found


@pytest.mark.parametrize(
    "rename",
    [
        {"h.*.attn": "layers.*.attention", "ln": "norm"},
        {"h.*.attn.w": "layers.*.attention.w", "ln.w": "norm.w"},
        {re.compile(r"^h\.(\d+)\.attn"): r"layers.\1.attention", "ln": "norm"},
        lambda name: re.sub(r"^h\.(\d+)\.attn", r"layers.\1.attention", name).replace("ln", "norm"),
    ],
    ids=["prefix pattern", "pattern of whole names", "regular expression", "function"],
)
def test_one_rule_renames_all_layers(source: Path, rename: Any) -> None:
    expected = {"layers.0.attention.w": 0, "h.0.mlp.w": 1, "layers.1.attention.w": 2, "h.1.mlp.w": 3,
                "layers.10.attention.w": 4, "h.10.mlp.w": 5, "norm.w": 6}  # fmt: skip
    assert values(ce.load(source, rename=rename)) == expected


def test_a_star_is_one_part_of_a_name_and_two_are_any_number(source: Path) -> None:
    assert "x.w" in values(ce.load(source, rename={"ln": "x", "h.**": "y.**"}))
    named = renamer({"a.*.w": "b.*.w"}, {})
    assert named(("a", "1", "2", "w")) == ("a", "1", "2", "w")
    assert renamer({"a.**.w": "b.**.w"}, {})(("a", "1", "2", "w")) == ("b", "1", "2", "w")
    assert renamer({"a.*.b.*": "*.c.*"}, {})(("a", "1", "b", "2")) == ("1", "c", "2")


def test_plain_prefixes_come_before_patterns_and_patterns_in_their_order(source: Path) -> None:
    rules = {"h.*": "late.*", "h.*.attn": "never.*", "h.1": "first"}
    assert set(values(ce.load(source, rename=rules))) == {
        "late.0.attn.w", "late.0.mlp.w", "first.attn.w", "first.mlp.w", "late.10.attn.w", "late.10.mlp.w", "ln.w",
    }  # fmt: skip


def test_a_pattern_fills_a_module_and_its_optimizer(tmp_path: Path) -> None:
    old = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])})
    new = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])})
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (old, new)]
    for net, optimizer in zip((old, new), optimizers, strict=True):
        for parameter in net.parameters():
            parameter.grad = torch.rand_like(parameter)
        optimizer.step()
    ce.save(tmp_path / "c", {"model": old, "optimizer": optimizers[0]})
    ce.load(tmp_path / "c", into={"model": new, "optimizer": optimizers[1]}, rename={"model.h.*": "model.layers.*"})
    same(list(new.state_dict().values()), list(old.state_dict().values()))
    same(optimizers[1].state_dict()["state"], optimizers[0].state_dict()["state"])


@pytest.mark.parametrize("rename", [{"h.*.attn": "x"}, {"h": "x.*"}, {"h.*": "x.*.*"}, {"h": 1}, {1: "h"}], ids=str)
def test_a_rule_that_says_nothing_is_refused(source: Path, rename: Any) -> None:
    with pytest.raises(ValueError, match="rename="):
        ce.load(source, rename=rename)


def test_names_that_a_rule_makes_one_are_an_error_that_names_both(source: Path) -> None:
    with pytest.raises(LoadMismatchError, match=r"'h\.\d+\.attn\.w' and 'h\.\d+\.attn\.w' would both be called 'x'"):
        ce.load(source, rename={re.compile(r"^h\.\d+\.attn\.w$"): "x"})
    with pytest.raises(LoadMismatchError, match="two leaves of the checkpoint are called 'x'"):
        ce.load(source, into={"x": torch.zeros(2)}, rename=lambda name: "x")


def test_a_function_that_returns_no_name_is_an_error(source: Path) -> None:
    with pytest.raises(LoadMismatchError, match=r"the function made None of 'h.0.attn.w'"):
        ce.load(source, rename=lambda name: None)  # type: ignore[arg-type,return-value]


def test_names_of_ten_thousand_tensors_are_found_at_once(tmp_path: Path) -> None:
    """One look at each dict of the state, not one for each name."""
    tensors = {f"layer.{number}": torch.full((1,), float(number)) for number in range(10_000)}
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors")
    state = {"net": {name: torch.zeros(1) for name in tensors}}
    assert ce.load(tmp_path / "c.safetensors", into=state, rename={"": "net"}).complete
    same(state["net"], tensors)
