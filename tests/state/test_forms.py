"""Containers that hold arrays and are more than lists, tuples and dicts."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
from state_memory import load, save

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.state.tree import flatten

Pair = namedtuple("Pair", "mean count")


class AttrDict(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def full(number: float) -> np.ndarray[Any, Any]:
    return np.full(3, number)


def containers(number: float) -> dict[str, Any]:
    return {
        "deque": deque([full(number), number], maxlen=4),
        "pair": Pair(full(number), number if number else 0),
        "default": defaultdict(list, {"a": [full(number)]}),
        "odd": {0.5: full(number), (1, "x"): full(number + 1), "plain": number, None: full(number + 2)},
        "nested": [deque([{(0, 1): Pair(full(number), [number])}])],
        "ordered": OrderedDict([("b", full(number)), ("a", number)]),
    }


def plain(value: Any) -> Any:
    """Return a form in which equal means: same classes, same order, same contents."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return type(value), [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), getattr(value, "maxlen", None), [plain(item) for item in value]
    return value


def test_they_are_filled_in_place() -> None:
    state = {"x": containers(0)}
    state["x"]["pair"] = state["x"]["pair"]._replace(count=3)
    array = state["x"]["odd"][1, "x"]
    assert load(save({"x": containers(3)}), state).complete
    assert plain(state["x"]) == plain(containers(3))
    assert state["x"]["odd"][1, "x"] is array


@pytest.mark.parametrize("make", [lambda: {"x": Holder(None)}, lambda: {"x": None}])
def test_they_are_built_anew_where_there_are_none_yet(make: Any) -> None:
    state = make()
    held = isinstance(state["x"], Holder)
    stored = save({"x": Holder(containers(3)) if held else containers(3)})
    assert load(stored, state).complete
    assert plain(state["x"].value if held else state["x"]) == plain(containers(3))


def test_a_file_gives_them_back_without_a_state(tmp_path: Any) -> None:
    ce.save(tmp_path / "point", {"x": containers(3)})
    loaded = ce.load(tmp_path / "point")["x"]
    assert plain(loaded) == plain(containers(3))


def test_later_saves_see_what_has_changed_in_them(tmp_path: Any) -> None:
    state: dict[str, Any] = {"x": containers(0)}
    ce.save(tmp_path / "point", state)
    state["x"]["deque"].append(full(7))
    state["x"]["odd"][2.5] = full(8)
    state["x"]["odd"][0.5][:] = 9
    ce.save(tmp_path / "point", state)
    loaded = ce.load(tmp_path / "point")["x"]
    assert plain(loaded["deque"]) == plain(state["x"]["deque"])
    assert plain(loaded["odd"]) == plain(state["x"]["odd"])
    state["x"]["deque"] = deque(state["x"]["deque"], maxlen=9)
    ce.save(tmp_path / "point", state)
    assert ce.load(tmp_path / "point")["x"]["deque"].maxlen == 9


def test_a_class_made_from_dict_is_filled_and_made_anew_like_the_one_that_is_there() -> None:
    stored = save({"config": AttrDict(lr=0.5, w=full(2)), "held": Holder(AttrDict(w=full(3)))})
    config, holder = AttrDict(lr=0.1, w=full(0)), Holder(AttrDict(w=full(0)))
    assert load(stored, {"config": config, "held": holder}).complete
    assert (config.lr, config.w.tolist()) == (0.5, [2, 2, 2])
    assert type(holder.value) is AttrDict
    assert holder.value.w.tolist() == [3, 3, 3]
    with pytest.raises(LoadMismatchError, match="held.value: is a .*AttrDict in the checkpoint, and there is none"):
        load(stored, {"config": config, "held": Holder(None)})


def test_keys_that_cannot_be_told_apart_or_saved_are_refused() -> None:
    for value, text in (
        ({0.5: full(1), "0.5": full(2)}, "x: two keys of the dict are written '0.5'"),
        ({object: full(1)}, "x.<key .*can't be saved"),
        (defaultdict(list, {0.5: full(1)}), "x: a collections.defaultdict that holds tensors needs keys"),
        (defaultdict(lambda: 0, {"a": full(1)}), "x: the default_factory of the defaultdict is <function"),
    ):
        with pytest.raises(StateError, match=text):
            flatten({"x": value})
