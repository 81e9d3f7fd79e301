from __future__ import annotations

from collections import Counter, OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from state_memory import load, save

from ckptengine.errors import CheckpointDamagedError, LoadMismatchError, StateError
from ckptengine.schema.leaf import Placement
from ckptengine.state.bind import Saved, SavedLeaf, bind
from ckptengine.state.per_rank import PerRank
from ckptengine.state.sharded import ShardedArray


class Thing:
    """What it holds may change its size, as a sampler's or a history's does."""

    def __init__(self, **state: Any) -> None:
        self.state, self.loads = state, 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.loads = state, self.loads + 1


def test_arrays_are_filled_in_place_and_values_are_set() -> None:
    stored = save(
        {
            "w": np.arange(6.0).reshape(2, 3),
            "plain": {"step": 7, "name": "x", "list": [1, 2]},
            "mixed": [np.ones(2), 5, {"a": np.zeros(1), "b": "b"}],
            "counts": Counter(a=2),
            "order": OrderedDict(z=1, a=2),
            "empty": np.zeros((0, 2)),
        }
    )
    w, inner, numbers = np.zeros((3, 2)).T, {"step": 0, "name": "", "list": [0]}, np.zeros(2)
    counts, order = Counter(b=1), OrderedDict(a=0)
    state = {
        "w": w,
        "plain": inner,
        "mixed": [numbers, 0, {"a": np.ones(1), "b": ""}],
        "counts": counts,
        "order": order,
        "empty": np.ones((0, 2)),
    }
    plain_list = inner["list"]
    report = load(stored, state)
    assert state["w"] is w
    assert w.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert state["plain"] is inner
    assert inner == {"step": 7, "name": "x", "list": [1, 2]}
    assert inner["list"] is plain_list
    assert state["mixed"][0] is numbers
    assert numbers.tolist() == [1, 1]
    assert state["mixed"][1:] == [5, {"a": np.zeros(1), "b": "b"}]
    assert state["counts"] is counts
    assert counts == Counter(a=2)
    assert list(order.items()) == [("z", 1), ("a", 2)]
    assert report.complete
    assert set(report.loaded) == {
        *("w", "empty", "counts", "order", "plain.step", "plain.name", "plain.list"),
        *("mixed.0", "mixed.1", "mixed.2.a", "mixed.2.b"),
    }
    assert str(report) == "11 loaded"


def test_nothing_changes_before_finish() -> None:
    stored = save({"a": 1, "thing": Thing(x=2), "w": np.ones(2)})
    state = {"a": 0, "thing": Thing(x=0), "w": np.zeros(2)}
    binding = bind(state, stored.saved, 0, 1)
    assert (state["a"], state["thing"].state, state["w"].tolist()) == (0, {"x": 0}, [0, 0])
    assert len(binding.reads) == 1
    binding.finish()
    assert (state["a"], state["thing"].state) == (1, {"x": 2})
    with pytest.raises(RuntimeError, match="already"):
        binding.finish()


def test_objects_get_back_what_they_gave_whatever_they_hold_now() -> None:
    saved = {"a": np.arange(3), "list": [np.ones(2), (1,)], "names": {"x": 1, "y": {}}, "step": 3}
    stored = save({"thing": Thing(**saved)})
    kept = np.zeros(3, np.int64)
    thing = Thing(a=kept, other=1, list=[np.zeros(5)])
    report = load(stored, {"thing": thing})
    assert thing.loads == 1
    assert thing.state["a"] is kept
    assert kept.tolist() == [0, 1, 2]
    assert thing.state["list"][0].tolist() == [1, 1]
    assert thing.state["list"][1] == (1,)
    assert {key: thing.state[key] for key in ("names", "step")} == {"names": {"x": 1, "y": {}}, "step": 3}
    assert "other" not in thing.state
    assert report.loaded == ("thing",)


def test_every_leaf_that_does_not_fit_is_listed_at_once() -> None:
    stored = save({"a": np.zeros(2), "b": np.zeros(2), "c": 1, "d": np.zeros(1), "e": 5, "f": {"x": 1}})
    state = {
        "a": np.zeros(3),
        "b": np.zeros(2, np.float32),
        "c": np.zeros(1),
        "d": 3,
        "new": 1,
        "more": Thing(),
        "f": {"x": {"y": 1}},
    }
    with pytest.raises(LoadMismatchError) as caught:
        bind(state, stored.saved, 0, 1)
    text = str(caught.value)
    for line in (
        "a: shape (3,) here, (2,) in the checkpoint",
        "b: dtype float32 here, float64 in the checkpoint",
        "c: a tensor here, a plain value (int) in the checkpoint",
        "d: int here, a tensor of shape (1,) in the checkpoint",
        "f.x: dict of several leaves here, a plain value (int) in the checkpoint",
        "  new\n",
        "  more\n",
        "  e\n",
    ):
        assert line in text


def test_what_does_not_fit_is_left_alone_and_reported_when_not_strict() -> None:
    stored = save({"a": np.ones(2), "b": np.ones(2), "old": 1})
    state = {"a": np.zeros(3), "b": np.zeros(2), "new": 5}
    report = load(stored, state, strict=False)
    assert state["a"].tolist() == [0, 0, 0]
    assert state["b"].tolist() == [1, 1]
    assert state["new"] == 5
    assert report.loaded == ("b",)
    assert report.missing == ("new",)
    assert report.unexpected == ("old",)
    assert report.mismatched == ("a: shape (3,) here, (2,) in the checkpoint",)
    assert "1 loaded, 1 mismatched, 1 missing in the checkpoint, 1 unexpected" in str(report)


def test_dtypes_change_only_when_told() -> None:
    stored = save({"a": np.array([1.5, 2.5, 1e300]), "c": np.array([1j])})
    state: dict[str, Any] = {"a": np.zeros(3, np.float32)[::-1], "c": np.zeros(1, np.complex64)}
    report = load(stored, state, cast=True)
    assert state["a"].tolist() == [1.5, 2.5, np.inf]
    assert state["c"].tolist() == [1j]
    assert report.cast == ("a", "c")
    with pytest.raises(LoadMismatchError, match="`cast` can't convert"):
        load(stored, {"a": np.zeros(3), "c": np.zeros(1)}, cast=True)


def test_a_placeholder_takes_whatever_was_saved() -> None:
    stored = save({"best": {"loss": 0.5, "w": np.ones(2)}, "history": [np.ones(1), 2], "none": None})
    state: dict[str, Any] = {"best": {}, "history": None, "none": {"a": 1}}
    with pytest.raises(LoadMismatchError, match="none: dict of several leaves"):
        load(stored, state)
    state["none"] = {}
    load(stored, state)
    assert state["best"]["loss"] == 0.5
    assert state["best"]["w"].tolist() == [1, 1]
    assert [state["history"][0].tolist(), state["history"][1], state["none"]] == [[1], 2, None]


def test_a_dict_that_was_empty_is_emptied() -> None:
    inner = {"a": 1, "b": [2]}
    load(save({"x": {}}), {"x": inner})
    assert inner == {}


def test_only_restricts_to_parts_of_the_state() -> None:
    stored = save({"a": {"x": np.ones(1), "y": 1}, "ab": 2, "c": 3, "thing": Thing(z=4)})
    state = {"a": {"x": np.zeros(1), "y": 0, "new": 0}, "ab": 0, "thing": Thing(z=0)}
    report = load(stored, state, only=["a.x", "thing"])
    assert report.complete
    assert report.loaded == ("a.x", "thing")
    assert (state["a"]["y"], state["ab"], state["thing"].state) == (0, 0, {"z": 4})
    with pytest.raises(LoadMismatchError, match=r"a\.new"):
        load(stored, state, only=["a"])
    with pytest.raises(LoadMismatchError, match="nothing with that name"):
        load(stored, state, only=["a.x", "nothing"])
    with pytest.raises(LoadMismatchError, match="as a whole"):
        load(stored, state, only=["thing.z"])


def test_rename_leads_from_the_checkpoints_names_to_the_states() -> None:
    stored = save({"old": {"x.y": 1, "deep": {"z": np.ones(2)}}, "keep": 3})
    state = {"new": {"part.one": {"x.y": 0, "shallow": {"z": np.zeros(2)}}}, "keep": 0}
    report = load(stored, state, rename={"old": "new.part.one", "old.deep": "new.part.one.shallow"})
    assert report.complete
    assert state["new"]["part.one"]["x.y"] == 1
    assert state["new"]["part.one"]["shallow"]["z"].tolist() == [1, 1]
    bare: dict[str, Any] = {"x.y": 0, "deep": {"z": np.zeros(2)}, "keep": 0}
    assert load(stored, bare, rename={"old": ""}).complete
    wrapped = {"all": {"old": {"x.y": 0, "deep": {"z": np.zeros(2)}}, "keep": 0}}
    assert load(stored, wrapped, rename={"": "all"}).complete
    with pytest.raises(LoadMismatchError, match="change `rename`"):
        load(stored, {"keep": 0}, rename={"old.deep.z": "keep"})


def test_a_tied_array_is_read_once_by_any_of_its_names() -> None:
    array, other = np.arange(3), np.arange(3)
    stored = save({"a": array, "b": array})
    apart = {"a": np.zeros(3, np.int64), "b": np.zeros(3, np.int64)}
    load(stored, apart)
    assert apart["a"].tolist() == apart["b"].tolist() == [0, 1, 2]
    tied = np.zeros(3, np.int64)
    binding = bind({"a": tied, "b": tied}, stored.saved, 0, 1)
    assert len(binding.reads) == 1
    once = save({"b": other})
    assert load(once, {"a": tied, "b": tied}).complete
    assert tied.tolist() == [0, 1, 2]


def test_values_in_a_tuple_can_only_stay_as_they_are() -> None:
    stored = save({"x": (np.ones(1), 3)})
    load(stored, {"x": (np.zeros(1), 3)})
    with pytest.raises(StateError, match=r"x\.1: .*use a list or a dict"):
        load(stored, {"x": (np.zeros(1), 4)})
    with pytest.raises(StateError, match="can't be changed"):
        load(save({"x": 1}), MappingProxyType({"x": 0}))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_an_array_that_cannot_be_written_to_is_replaced_where_that_is_possible(shape: tuple[int, ...]) -> None:
    stored = save({"x": [np.ones(shape)]})
    frozen = np.zeros(shape)
    frozen.flags.writeable = False
    state = {"x": [frozen]}
    assert load(stored, state).complete
    assert state["x"][0].tolist() == np.ones(shape).tolist()
    assert frozen.tolist() == np.zeros(shape).tolist()
    with pytest.raises(StateError, match="0: the array is read-only"):
        load(save({"x": (np.ones(shape),)}), {"x": (frozen,)})


def test_an_array_whose_elements_share_memory_is_refused_when_it_is_saved() -> None:
    shared = np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,))
    for act in (save, lambda state: load(save({"x": np.ones(3)}), state)):
        with pytest.raises(StateError, match="x: the array's elements share memory"):
            act({"x": shared})


def test_each_rank_gets_its_own_back() -> None:
    def state(rank: int) -> dict[str, Any]:
        return {
            "plain": PerRank(rank),
            "dict": PerRank({"w": np.full(2, float(rank)), "list": [np.full(1, rank), rank]}),
            "thing": PerRank(Thing(r=rank)),
            "inside": Thing(shared=1, own=PerRank(f"r{rank}")),
        }

    stored = save(*(state(rank) for rank in range(3)))
    target = state(9)
    assert load(stored, target, rank=1).complete
    assert target["plain"].value == 1
    assert target["dict"].value["w"].tolist() == [1, 1]
    assert target["dict"].value["list"][1] == 1
    assert target["thing"].value.state == {"r": 1}
    assert target["inside"].state == {"shared": 1, "own": "r1"}


def test_another_world_size_needs_resize_and_says_so() -> None:
    stored = save(*({"x": {"cursor": PerRank([rank])}} for rank in range(3)))
    with pytest.raises(LoadMismatchError, match=r"x\.cursor: saved per rank by 3 ranks, loaded by 2; pass PerRank"):
        load(stored, {"x": {"cursor": PerRank([0])}}, rank=0, world_size=2)


def test_resize_gets_what_all_ranks_saved() -> None:
    def state(rank: int) -> dict[str, Any]:
        return {"own": PerRank({"w": np.full(2, rank), "n": rank}), "thing": PerRank(Thing(r=rank))}

    stored = save(*(state(rank) for rank in range(3)))
    calls = []

    def merge(saved: list[Any], rank: int, world_size: int) -> Any:
        calls.append((rank, world_size))
        return {"w": sum(item["w"] for item in saved), "n": [item["n"] for item in saved]}

    inner: dict[str, Any] = {"w": np.zeros(2), "n": 0}
    thing = Thing()
    target = {
        "own": PerRank(inner, resize=merge),
        "thing": PerRank(thing, resize=lambda saved, rank, world_size: saved[rank]),
    }
    report = load(stored, target, rank=1, world_size=2)
    assert report.complete
    assert calls == [(1, 2)]
    assert inner["w"].tolist() == [3, 3]
    assert inner["n"] == [0, 1, 2]
    assert thing.state == {"r": 1}


@pytest.mark.parametrize("world_size", [3, 2])
def test_a_per_rank_that_says_whose_values_it_needs_gets_those_alone(world_size: int) -> None:
    stored = save(*({"x": PerRank({"w": np.full(2, rank), "n": rank})} for rank in range(3)))
    asked, given = [], []

    def ranks(*sizes: int) -> list[int]:
        asked.append(sizes)
        return [2, 0]

    def resize(saved: list[Any], rank: int, world_size: int) -> Any:
        given.append([(int(item["w"][1]), item["n"]) for item in saved])
        return {"w": saved[0]["w"], "n": rank}

    target = {"x": PerRank({"w": np.zeros(2), "n": 9}, resize=resize, ranks=ranks)}
    assert load(stored, target, rank=1, world_size=world_size).complete
    assert (asked, given) == ([(3, 1, world_size)], [[(2, 2), (0, 0)]])
    assert target["x"].value["w"].tolist() == [2, 2]
    assert target["x"].value["n"] == 1
    target["x"].ranks = lambda saved, rank, world_size: [saved]
    with pytest.raises(ValueError, match="x: PerRank's `ranks` asks for rank 3 of 3 that saved"):
        load(stored, target, rank=1, world_size=world_size)


def test_an_object_with_values_per_rank_that_was_not_saved_is_left_alone() -> None:
    thing = Thing(shared=1, own=PerRank("mine"))
    report = load(save({"a": 1}), {"a": 0, "thing": thing}, strict=False)
    assert report.missing == ("thing",)
    assert thing.state["own"].value == "mine"


def test_per_rank_in_the_checkpoint_and_not_in_the_state_is_explained() -> None:
    stored = save({"a": PerRank(1), "b": 2}, {"a": PerRank(2), "b": 2})
    with pytest.raises(LoadMismatchError, match=r"a: each rank has its own in the checkpoint; wrap it in ce\.PerRank"):
        load(stored, {"a": 0, "b": 0})
    target = {"a": PerRank(0), "b": PerRank(0)}
    assert load(stored, target, rank=1).complete
    assert (target["a"].value, target["b"].value) == (2, 2)


def test_hand_sharded_arrays_are_filled_from_any_other_split() -> None:
    whole = np.arange(20.0).reshape(10, 2)
    stored = save(*({"x": ShardedArray(whole[i : i + 5].copy(), (10, 2), (i, 0))} for i in (0, 5)))
    part = np.zeros((4, 1))
    load(stored, {"x": ShardedArray(part, (10, 2), (3, 1))})
    assert np.array_equal(part, whole[3:7, 1:])
    cast = np.zeros((4, 1), np.float32)
    assert load(stored, {"x": ShardedArray(cast, (10, 2), (3, 1))}, cast=True).cast == ("x",)
    assert np.array_equal(cast, whole[3:7, 1:])


def test_a_checkpoint_whose_tables_contradict_themselves_is_refused() -> None:
    leaf = SavedLeaf("float32", (1,), Placement.REPLICATED, "numpy")
    broken = Saved(1, {}, {}, {("a",): ("b",)}, {})
    with pytest.raises(CheckpointDamagedError, match="a is the same tensor as b"):
        bind({"a": np.zeros(1)}, broken, 0, 1)
    inside = Saved(1, {("a",): leaf}, {("a", "b"): 1}, {}, {})
    with pytest.raises(LoadMismatchError, match="other leaves inside"):
        bind({"a": np.zeros(1)}, inside, 0, 1)
    deep = Saved(1, {("a",) * 1000: leaf}, {}, {}, {})
    with pytest.raises(CheckpointDamagedError, match="1000 keys"):
        bind({"a": np.zeros(1)}, deep, 0, 1)


def test_a_part_of_an_array_without_a_place_in_the_state_is_no_whole_copy_on_every_rank() -> None:
    halves = [{"x": ShardedArray(np.arange(3) + 3 * rank, (6,), (3 * rank,))} for rank in range(2)]
    stored = save(*halves)
    with pytest.raises(LoadMismatchError, match="x: was spread over the ranks .*ShardedArray"):
        load(stored, {"x": None})
    alone: dict[str, Any] = {"x": None}
    load(stored, alone, world_size=1)
    assert alone["x"].tolist() == [0, 1, 2, 3, 4, 5]
