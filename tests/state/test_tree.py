from __future__ import annotations

import subprocess
import sys
from collections import Counter, OrderedDict
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from state_memory import read_part

from ckptengine.errors import CheckpointDamagedError, StateError
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Placement
from ckptengine.state.per_rank import PerRank
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.tree import flatten, unflatten


class Counted:
    def __init__(self) -> None:
        self.step, self.mean = 3, np.arange(4.0)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.mean = state["step"], state["mean"]


def only_leaf(value: Any) -> ArrayLeaf:
    (leaf,) = flatten({"x": value}).arrays
    return leaf


def test_keys_are_kept_as_they_are_and_never_joined() -> None:
    flat = flatten({"a.b": {"c": 1}, "a": {"b.c": 2, 0: 3, "0": 4}, "empty": {}})
    assert flat.values == {
        ("a.b", "c"): 1,
        ("a", "b.c"): 2,
        ("a", 0): 3,
        ("a", "0"): 4,
        ("empty",): {},
    }
    assert flat.arrays == ()


def test_a_list_without_arrays_is_one_value_and_one_with_arrays_is_walked() -> None:
    flat = flatten({"plain": [1, {"a": (2,)}], "mixed": ([1, np.zeros(2)], {"b": 3})})
    assert flat.values == {("plain",): [1, {"a": (2,)}], ("mixed", 0, 0): 1, ("mixed", 1, "b"): 3}
    assert flat.containers == {("mixed",): "tuple", ("mixed", 0): "list"}
    assert [leaf.path for leaf in flat.arrays] == [("mixed", 0, 1)]


def test_objects_are_walked_through_their_state_dict() -> None:
    flat = flatten({"thing": Counted(), "things": [Counted()]})
    assert flat.values == {("thing", "step"): 3, ("things", 0, "step"): 3}
    assert [leaf.path for leaf in flat.arrays] == [("thing", "mean"), ("things", 0, "mean")]


def test_what_differs_by_rank_is_kept_apart() -> None:
    flat = flatten({"a": PerRank({"x": 1, "y": [np.ones(3)]}), "b": PerRank(Counted()), "c": 2})
    assert flat.values == {("c",): 2}
    assert flat.rank_values == {("a", "x"): 1, ("b", "step"): 3}
    assert flat.rank_containers == {("a", "y"): "list"}
    assert flat.containers == {}
    assert {leaf.placement for leaf in flat.arrays} == {Placement.PER_RANK}
    with pytest.raises(StateError, match=r"a\.b: a PerRank inside a PerRank"):
        flatten({"a": PerRank({"b": PerRank(1)})})


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::-1, 1::2],
        np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        np.broadcast_to(np.float32(7), (3, 2)),
        np.array(5, np.complex64),
        np.arange(5).astype(ml_dtypes.bfloat16)[::-2],
        np.array([True, False]),
    ],
)
def test_strided_arrays_are_seen_where_they_lie(array: np.ndarray[Any, Any]) -> None:
    leaf = only_leaf(array)
    assert leaf.shape == array.shape
    assert leaf.container == "numpy"
    assert leaf.placement is Placement.REPLICATED
    (part,) = leaf.parts
    assert part.box == Box.whole(array.shape)
    assert isinstance(part.memory, HostMemory)
    assert part.memory.strides == array.strides
    assert read_part(part, leaf.dtype).tobytes() == array.tobytes()


def test_an_array_without_elements_has_no_parts() -> None:
    leaf = only_leaf(np.empty((0, 3), np.float32))
    assert (leaf.shape, leaf.parts) == ((0, 3), ())


def test_the_same_memory_is_stored_once() -> None:
    array = np.zeros(4)
    flat = flatten({"a": array, "b": {"c": array[:], "half": array[:2]}, "own": PerRank(array)})
    assert [leaf.path for leaf in flat.arrays] == [("a",), ("b", "half"), ("own",)]
    assert flat.aliases == {("b", "c"): ("a",)}


def test_a_hand_sharded_array_lies_at_its_place() -> None:
    leaf = only_leaf(ShardedArray(np.ones((2, 3)), (10, 3), (4, 0)))
    assert leaf.placement is Placement.SHARDED
    assert leaf.shape == (10, 3)
    assert [part.box for part in leaf.parts] == [Box((4, 0), (2, 3))]
    assert only_leaf(ShardedArray(np.ones((0, 3)), (10, 3), (10, 0))).parts == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3), (2,), (0,)), "leaves the global shape"),
        ((np.ones(3), (4,), (2,)), "leaves the global shape"),
        ((np.ones(3), (4,), (-1,)), "leaves the global shape"),
        ((np.ones(3), (4, 4), (0,)), "number of dimensions"),
        (([1, 2], (4,), (0,)), "is list, not an array"),
    ],
)
def test_a_hand_sharded_array_must_fit(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(StateError, match=message):
        ShardedArray(*arguments)


class Row(list[Any]):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([1, 2], ">i4"), r"state\.x: .*byte order"),
        (np.array([None]), r"state\.x: arrays of dtype object"),
        (np.array(["a"]), r"state\.x: arrays of dtype <U1"),
        (np.zeros(2, [("a", "i4")]), r"state\.x: arrays of dtype"),
        (np.ma.masked_array([1.0, 2.0]), r"state\.x: a masked array"),
        (Row([np.zeros(1), 2]), r"state\.x: .*Row holds tensors"),
        ({(1, object): np.zeros(1)}, r"state\.x\..*type can't be saved"),
        (MappingProxyType({"a": np.zeros(1)}), r"state\.x: .*mappingproxy holds tensors"),
        (PerRank(ShardedArray(np.zeros(1), (2,), (0,))), r"state\.x: a ShardedArray inside PerRank"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        flatten({"state": {"x": value}})


def test_a_state_inside_itself_is_refused() -> None:
    state: dict[str, Any] = {"a": {}}
    state["a"]["again"] = state["a"]
    with pytest.raises(StateError, match="deep"):
        flatten(state)
    with pytest.raises(StateError, match=r"the key \(1,\) is tuple"):
        flatten({(1,): 2})  # type: ignore[dict-item]
    with pytest.raises(StateError, match="the state is list"):
        flatten([])  # type: ignore[arg-type]


def test_counters_and_ordered_dicts_of_plain_values_are_values() -> None:
    state = {
        "counter": Counter("aab"),
        "ordered": OrderedDict(a=1),
        "walked": OrderedDict(a=np.zeros(1), b=2),
    }
    flat = flatten(state)
    assert flat.values == {("counter",): state["counter"], ("ordered",): state["ordered"], ("walked", "b"): 2}


def test_flattening_and_unflattening_gives_the_same_nesting() -> None:
    array = np.arange(3)
    state = {
        "a": {"b": [array, (1, array[:2])], 0: {}},
        "c": ({"d": array[1:]},),
        "tied": array,
        "e": [1, (2,)],
    }
    flat = flatten(state)
    arrays = {leaf.path: leaf.path for leaf in flat.arrays}
    assert unflatten(flat.values, arrays, flat.containers, flat.aliases) == {
        "a": {"b": [("a", "b", 0), (1, ("a", "b", 1, 1))], 0: {}},
        "c": ({"d": ("c", 0, "d")},),
        "tied": ("a", "b", 0),
        "e": [1, (2,)],
    }


def test_a_part_of_a_sequence_comes_as_a_dict() -> None:
    assert unflatten({("a", 1): 5}, {}, {("a",): "list"}, {("b",): ("gone",)}) == {"a": {1: 5}}


@pytest.mark.parametrize("paths", [[()], [("a",), ("a", "b")], [("a", "b"), ("a",)], [("a",) * 200]])
def test_paths_that_nobody_wrote_are_called_damaged(paths: list[Any]) -> None:
    with pytest.raises(CheckpointDamagedError):
        unflatten(dict.fromkeys(paths, 1), {}, {}, {})


def test_arrays_are_flattened_without_importing_a_framework() -> None:
    code = """
import sys, numpy as np
from ckptengine.state import bind, tree, values
flat = tree.flatten({"a": np.zeros(2), "b": [1]})
assert values.decode({"$torch.dtype": "bfloat16"}) == "torch.bfloat16"
assert values.decode({"$torch.size": [2, 3]}) == (2, 3)
assert values.decode({"$torch.device": "cuda:1"}) == "cuda:1"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_tensor_of_more_dimensions_than_a_checkpoint_can_describe_is_refused_by_name():
    with pytest.raises(StateError, match=r"model\.w: a tensor of 33 dimensions; 32 is the most"):
        flatten({"model": {"w": np.zeros((1,) * 33)}})
    assert flatten({"w": np.zeros((1,) * 32)}).arrays[0].shape == (1,) * 32
