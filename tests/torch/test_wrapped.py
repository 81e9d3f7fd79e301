"""Tensor subclasses that are made of other tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import Blocks, BlockSGD
from state_memory import load, save

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.state.per_rank import PerRank
from ckptengine.state.tree import flatten


def values(number: float) -> torch.Tensor:
    return torch.arange(24.0).reshape(6, 4) + number


def inner(tensor: Blocks) -> list[list[float]]:
    return [getattr(tensor, name).tolist() for name in ("codes", "scale", "table")]


def test_the_inner_tensors_are_leaves_and_are_filled_in_place() -> None:
    source, target = Blocks.of(values(3)), Blocks.of(values(0))
    codes = target.codes
    stored = save({"x": {"moment": source}})
    assert sorted(str(path[-1]) for path, _ in stored.arrays) == ["codes", "scale", "table"]
    assert load(stored, {"x": {"moment": target}}).complete
    assert inner(target) == inner(source)
    assert target.codes is codes


@pytest.mark.parametrize("holder", [lambda x: x, PerRank, lambda x: [x, (x.detach(),)]])
def test_a_subclass_that_the_state_has_not_yet_is_made_by_its_class(holder: Any) -> None:
    source = Blocks.of(values(3))
    stored = save({"x": holder(source)})
    state: dict[str, Any] = {"x": PerRank(None) if holder is PerRank else None}
    assert load(stored, state).complete
    made = state["x"].value if holder is PerRank else state["x"]
    made = made[0] if isinstance(made, list) else made
    assert type(made) is Blocks
    assert made.shape == source.shape
    assert inner(made) == inner(source)


def test_a_fresh_optimizer_goes_on_with_its_quantized_state(tmp_path: Any) -> None:
    model = torch.nn.Linear(4, 6, bias=False)
    optimizer = BlockSGD(model.parameters())
    optimizer.step()
    ce.save(tmp_path / "point", {"model": model, "optimizer": optimizer})
    optimizer.step()
    other = torch.nn.Linear(4, 6, bias=False)
    fresh = BlockSGD(other.parameters())
    ce.load(tmp_path / "point", into={"model": other, "optimizer": fresh})
    fresh.step()
    assert torch.equal(other.weight, model.weight)
    plain = ce.load(tmp_path / "point")["optimizer"]["state"]["model.weight"]["moment"][0]
    assert plain["tensor_subclass"]["class"] == "blocks.Blocks"
    assert plain["codes"].shape == (24,)


def test_later_saves_see_what_has_changed_inside(tmp_path: Any) -> None:
    state = {"x": Blocks.of(values(3))}
    for number in range(3):
        state["x"].codes.fill_(number)
        if number == 2:
            state["x"].signed = False
        ce.save(tmp_path / "point", state)
        stored = ce.load(tmp_path / "point")["x"]
        assert stored["codes"].tolist() == [number] * 24
        assert stored["tensor_subclass"]["context"][0] is (number < 2)


def test_what_is_made_in_another_way_is_a_mismatch() -> None:
    source = Blocks.of(values(3))
    stored = save({"x": source})
    other = Blocks.of(values(0))
    other.signed = False
    with pytest.raises(
        LoadMismatchError, match=r"x: a blocks.Blocks: context \[False.* here, \[True.* in the checkpoint"
    ):
        load(stored, {"x": other})
    with pytest.raises(LoadMismatchError, match="x: a tensor here, several leaves in the checkpoint"):
        load(stored, {"x": torch.zeros(6, 4)})
    with pytest.raises(LoadMismatchError, match="x: a blocks.Blocks here, a tensor of shape .* in the checkpoint"):
        load(save({"x": torch.zeros(6, 4)}), {"x": other})


def test_a_class_that_is_not_imported_is_not_imported_by_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptengine.torch import wrapped

    stored = save({"x": Blocks.of(values(3))})
    wrapped._class_of.cache_clear()
    monkeypatch.delitem(__import__("sys").modules, "blocks")
    with pytest.raises(LoadMismatchError, match="x: is a blocks.Blocks in the checkpoint; import it before the load"):
        load(stored, {"x": None})
    wrapped._class_of.cache_clear()


def test_nested_tensors_are_still_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    with pytest.raises(StateError, match="x: "):
        flatten({"x": nested})
