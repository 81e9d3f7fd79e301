"""What a tensor is beside its contents comes back with it, where the engine makes it anew."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.save.reading import StateReader


class Holder:
    """An object that keeps what it is given, of any kind."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class OwnParameter(nn.Parameter):
    pass


class OwnTensor(torch.Tensor):
    pass


class OwnArray(np.ndarray):
    pass


class Extra(nn.Module):
    """A module with extra state."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


KINDS = {
    "plain": lambda: torch.ones(2),
    "takes a gradient": lambda: torch.ones(2, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "frozen parameter": lambda: nn.Parameter(torch.ones(2), False),
    "own parameter": lambda: OwnParameter(torch.ones(2)),
    "frozen own parameter": lambda: OwnParameter(torch.ones(2), False),
    "own tensor": lambda: torch.ones(2).as_subclass(OwnTensor),
    "array": lambda: np.ones(2, np.float32),
    "own array": lambda: np.ones(2, np.float32).view(OwnArray),
    "matrix": lambda: np.ones((1, 2), np.float32).view(np.matrix),
}
PLACES = {
    "object": lambda value: Holder({"x": value, "y": [value]}),
    "per rank": lambda value: ce.PerRank(Holder({"x": value})),
    "extra state": lambda value: Extra({"x": value, "y": (value,)}),
}


def tensors_of(place):
    state = place.value.state if isinstance(place, ce.PerRank) else place.state
    for item in state.values() if isinstance(state, dict) else state:
        yield from item if isinstance(item, list | tuple) else [item]


@pytest.mark.parametrize("here", [None, "plain", "parameter", "own tensor", "array"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_comes_back_as_what_it_was_whatever_was_there(tmp_path, kind, place, here):
    saved = PLACES[place](KINDS[kind]())
    ce.save(tmp_path / "point", {"a": saved})
    fresh = PLACES[place](None)
    if here is not None:
        there = KINDS[here]()
        fresh = PLACES[place](there.detach() * 0 if here == "plain" else there)
    ce.load(tmp_path / "point", into={"a": fresh})
    before, after = list(tensors_of(saved)), list(tensors_of(fresh))
    assert list(map(type, after)) == list(map(type, before))
    assert [getattr(one, "requires_grad", None) for one in after] == [
        getattr(one, "requires_grad", None) for one in before
    ]
    assert [one.tolist() for one in after] == [one.tolist() for one in before]
    assert len({id(one) for one in after}) == 1  # two names of one tensor


@pytest.mark.parametrize("made", ["own tensor", "own parameter", "own array"])
def test_attributes_that_would_be_lost_are_refused_when_they_are_saved(tmp_path, made):
    tensor = KINDS[made]()
    tensor.unit = "metres"
    with pytest.raises(StateError, match=r"a\.x: .*Own\w+ has attributes beside its contents \(unit\)"):
        ce.save(tmp_path / "point", {"a": Holder({"x": tensor})})
    ce.save(tmp_path / "point", {"x": tensor})  # there it is filled in place
    other = KINDS[made]()
    ce.load(tmp_path / "point", into={"x": other})
    with pytest.raises(LoadMismatchError, match="x: is a .*Own"):
        ce.load(tmp_path / "point", into={"x": None})


def test_a_class_that_is_not_imported_is_a_mismatch_that_names_it(tmp_path):
    class Local(torch.Tensor):
        pass

    ce.save(tmp_path / "point", {"a": Holder({"x": torch.ones(2).as_subclass(Local)})})
    with pytest.raises(LoadMismatchError, match=r"a\.x: is a .*Local in the checkpoint; import that class"):
        ce.load(tmp_path / "point", into={"a": Holder({})})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.ones(2), nn.Parameter(torch.ones(2))),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
        (np.ones(2), np.ones(2).view(OwnArray)),
        (nn.Parameter(torch.ones(2)), OwnParameter(torch.ones(2))),
    ],
)
def test_a_later_save_has_the_kind_of_that_save(first, second):
    reader = StateReader()
    found = [reader.read({"x": Holder({"p": one})}).plain.outline.kinds for one in (first, second, first)]
    assert found[0] == found[2] != found[1]


def test_what_a_tensor_was_computed_from_is_no_part_of_a_state(tmp_path):
    ce.save(tmp_path / "point", {"a": Holder({"loss": torch.ones(2, requires_grad=True) * 3})})
    fresh = Holder({})
    ce.load(tmp_path / "point", into={"a": fresh})
    fresh.state["loss"] += 1  # fails for a leaf that takes a gradient
    assert fresh.state["loss"].tolist() == [4, 4]


def test_a_parameter_and_its_data_under_another_name_stay_one_memory(tmp_path):
    parameter = nn.Parameter(torch.ones(2))
    ce.save(tmp_path / "point", {"a": Holder({"p": parameter, "data": parameter.data, "other": torch.ones(2)})})
    fresh = Holder({})
    ce.load(tmp_path / "point", into={"a": fresh})
    state = fresh.state
    assert [type(one) for one in state.values()] == [nn.Parameter, torch.Tensor, torch.Tensor]
    state["data"].fill_(5)
    assert state["p"].tolist() == [5, 5]
    assert state["other"].tolist() == [1, 1]


class Together(torch.optim.Optimizer):
    """All parameters count their steps in one tensor, and keep a parameter in their state."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        count = None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["mask"] = nn.Parameter(torch.ones_like(parameter), False)
                    state["count"] = torch.zeros(()) if count is None else count
                count = state["count"]
        count += 1


def test_parameters_that_share_a_tensor_in_an_optimizers_state_share_it_again(tmp_path):
    def make():
        model = nn.Linear(2, 2)
        return {"model": model, "optimizer": Together(model.parameters())}

    saved, fresh = make(), make()
    saved["optimizer"].step()
    ce.save(tmp_path / "point", saved)
    ce.load(tmp_path / "point", into=fresh)
    for state in (saved, fresh):
        state["optimizer"].step()
    for parameter in fresh["model"].parameters():
        assert type(fresh["optimizer"].state[parameter]["mask"]) is nn.Parameter
        assert fresh["optimizer"].state[parameter]["count"] == 2


def test_ordered_dicts_that_hold_arrays_are_ordered_dicts_in_what_load_returns(tmp_path):
    inner = OrderedDict(b=torch.ones(2), a=1)
    inner._metadata = {"": {"version": 2}}
    ce.save(tmp_path / "point", {"x": OrderedDict(z=(inner,), y=np.ones(1)), "o": Holder(inner)})
    loaded = ce.load(tmp_path / "point")
    assert [type(one) for one in (loaded["x"], loaded["x"]["z"][0], loaded["o"])] == [OrderedDict] * 3
    assert list(loaded["x"]) == ["z", "y"]
    assert list(loaded["o"]) == list(loaded["x"]["z"][0]) == ["b", "a"]
    assert loaded["o"]._metadata == {"": {"version": 2}}


def test_a_state_dict_that_is_a_live_object_itself_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"a: state_dict\(\) of .*Holder gives a .*Linear itself"):
        ce.save(tmp_path / "point", {"a": Holder(nn.Linear(1, 1))})


@pytest.mark.parametrize("wrap", [lambda value: value, ce.PerRank], ids=["shared", "per rank"])
@pytest.mark.parametrize("inner", [lambda number: number, lambda number: torch.full((2,), float(number))])
def test_a_live_object_in_extra_state_is_loaded_and_nothing_takes_its_place(tmp_path, wrap, inner):
    for place in (lambda value: value, lambda value: {"deep": value}):
        saved, live = (Holder({"x": inner(number)}) for number in (1, 2))
        ce.save(tmp_path / "point", {"m": wrap(Extra(place(saved)))})
        fresh = Extra(place(live))
        ce.load(tmp_path / "point", into={"m": wrap(fresh)})
        assert fresh.state == place(live)
        assert np.all(np.asarray(live.state["x"]) == 1)
