"""What `ce.Sharded` takes and refuses in one process, where every group has one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ckptengine as ce
from ckptengine.errors import StateError
from ckptengine.save.reading import StateReader

torch = pytest.importorskip("torch")


def model() -> torch.nn.Module:
    layers = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    layers.register_buffer("mean", torch.arange(6.0))
    return layers


def test_two_patterns_for_one_tensor_are_refused_naming_both() -> None:
    with pytest.raises(StateError, match=r"'0' and '\*\*\.weight' both fit 0\.weight"):
        ce.Sharded(model(), {"0": ce.Shard(0), "**.weight": ce.Shard(1)})


def test_a_pattern_that_fits_nothing_is_refused_with_the_names_that_are_there() -> None:
    with pytest.raises(StateError, match=r"'\*\.expert' fits no tensor on any rank; .* 0\.weight, 0\.bias"):
        ce.Sharded(model(), {"*.expert": ce.Shard(0)})


def test_a_dimension_that_a_tensor_has_not_is_refused_by_name() -> None:
    with pytest.raises(StateError, match=r"mean: split along dimension 1, and it has shape \(6,\); give a dict"):
        ce.Sharded(model(), dim=1)


def test_parts_that_do_not_share_the_dimension_are_refused() -> None:
    with pytest.raises(StateError, match=r"0\.weight: a dimension of 6 can't be shared by the parts .*'q': 3, 'k': 2"):
        ce.Sharded(model(), {"0.weight": ce.Shard(0, parts={"q": 3, "k": 2})})


def test_a_sharded_array_and_a_per_rank_value_inside_are_refused_by_name() -> None:
    with pytest.raises(StateError, match=r"table: a .*ShardedArray is declared with ce.Sharded, which is for plain"):
        ce.Sharded({"table": ce.ShardedArray(np.zeros(2), (4,), (0,))}, dim=0)
    inside = ce.PerRank(ce.Sharded(model(), dim=0))
    with pytest.raises(StateError, match=r"model: a ce\.Sharded in PerRank"):
        StateReader().read({"model": inside})


def test_a_list_that_is_no_list_of_modules_can_t_be_renumbered() -> None:
    with pytest.raises(StateError, match="'mean' fits mean, where no number follows"):
        ce.Sharded(model(), {"mean": ce.Renumbered()})


@pytest.mark.parametrize(
    "value",
    [
        {"experts": [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]},
        {"experts": [{"weight": torch.zeros(2)}]},
        {"experts": {"0": torch.nn.Linear(2, 2)}},
        {"experts.0.weight": torch.zeros(2)},
        [{"experts.0.weight": torch.zeros(2), "other": torch.nn.Linear(2, 2)}],
    ],
    ids=["list", "dicts", "dict", "state dict", "beside a module"],
)
def test_experts_that_no_module_numbers_are_refused_instead_of_saved_as_replicas(value: object) -> None:
    with pytest.raises(StateError, match=r"fits .*experts\.0\.weight, which is numbered by a dict or a list"):
        ce.Sharded(value, {"**.experts": ce.Renumbered()})


def test_experts_in_a_module_that_lies_in_a_dict_are_renumbered() -> None:
    declared = ce.Sharded(
        {"block": {"experts": torch.nn.ModuleList([torch.nn.Linear(2, 2)])}}, {"**.experts": ce.Renumbered()}
    )
    assert declared.shifts == {"block.experts": 0}


@pytest.mark.parametrize("rules", [{}, {"a": 1}, {"a": []}, {3: ce.Shard(0)}, {"a": ce.PerRank(1)}])
def test_rules_that_say_nothing_are_a_type_error(rules: object) -> None:
    with pytest.raises(TypeError, match="Sharded"):
        ce.Sharded(model(), rules)


def test_a_group_that_this_rank_is_not_in_is_refused() -> None:
    with pytest.raises(StateError, match="a group of ranks 1, 2, on rank 0 of 1"):
        ce.Sharded(model(), dim=0, group=[1, 2])


def test_a_tensor_that_changed_its_shape_since_is_refused_by_name() -> None:
    net = model()
    state = {"model": ce.Sharded(net, {"mean": ce.Shard(0)})}
    net.register_buffer("mean", torch.zeros(7))
    with pytest.raises(StateError, match=r"model\.mean: shape \(7,\) now, declared with shape \(6,\)"):
        StateReader().read(state)


def test_a_tensor_that_came_later_is_refused_by_name() -> None:
    net = model()
    state = {"model": ce.Sharded(net, {"*.weight": ce.Shard(0)})}
    net.append(torch.nn.Linear(4, 2))
    with pytest.raises(StateError, match=r"model\.2\.weight: did not exist when its ce\.Sharded was made"):
        StateReader().read(state)


def test_a_later_save_only_compares() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {"model": ce.Sharded(net, {"*.weight": ce.Shard(0, parts=("a", "b"))}), "optimizer": optimizer}
    reader = StateReader()
    first = reader.read(state)
    assert first.moved is None
    again = reader.read(state)
    assert again.structure is first.structure
    assert again.moved == {}  # compared with the walk before, and not walked
    with torch.no_grad():
        net[0].weight.data = net[0].weight.data.clone()  # elsewhere: its parts are found there
    (moved,) = reader.read(state).moved.values()
    assert [part.box.shape for part in moved] == [part.box.shape for part in first.leaves[1].parts]


def test_numpy_arrays_are_declared_in_the_same_way(tmp_path: Path) -> None:
    state = {"tables": ce.Sharded({"a": np.arange(12.0).reshape(3, 4), "b": np.arange(3)}, {"a": ce.Shard(-1)})}
    ce.save(tmp_path / "one", state)
    assert np.array_equal(ce.load(tmp_path / "one")["tables"]["a"], np.arange(12.0).reshape(3, 4))
    empty = {"tables": ce.Sharded({"a": np.zeros((3, 4)), "b": np.zeros(3, int)}, {"a": ce.Shard(-1)})}
    ce.load(tmp_path / "one", into=empty)
    assert np.array_equal(empty["tables"].value["a"], np.arange(12.0).reshape(3, 4))


def test_read_only_arrays_are_replaced_by_arrays_that_are_declared_alike(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, ce.Sharded]:
        arrays = {"part": np.full(2, value), "own": np.full(3, value)}
        for array in arrays.values():
            array.flags.writeable = False
        return {"v": ce.Sharded(arrays, {"part": ce.Shard(0), "own": ce.PerRank})}

    ce.save(tmp_path, state(5.0))
    found = state(0.0)
    ce.load(tmp_path, into=found)
    assert {name: array.tolist() for name, array in found["v"].value.items()} == {"part": [5, 5], "own": [5, 5, 5]}


def test_a_tensor_alone_is_declared_without_a_name(tmp_path: Path) -> None:
    ce.save(tmp_path / "one", {"weight": ce.Sharded(torch.arange(6.0), dim=0)})
    assert ce.load(tmp_path / "one")["weight"].tolist() == list(range(6))


def test_a_restore_casts_into_the_parts_of_a_fused_tensor(tmp_path: Path) -> None:
    ce.save(tmp_path / "one", {"w": torch.arange(12.0).view(4, 3)})
    target = torch.zeros(4, 3, dtype=torch.bfloat16)
    ce.load(tmp_path / "one", into={"w": ce.Sharded(target, dim=0, parts=("gate", "up"))}, cast=True)
    assert target.tolist() == torch.arange(12.0).view(4, 3).tolist()
