"""Kinds of state of which a restore could give something else than what was saved."""

from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from any_state import Keeper
from oracle import Oracle
from torch import nn

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, RestoreDifferenceError, StateError
from ckptengine.save.reading import StateReader
from ckptengine.state.tree import flatten


class Holder:
    """An object that keeps what it is given, of any kind."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


# Leaves that share memory, and are converted.


@pytest.mark.parametrize("make", [torch.zeros, lambda n: np.zeros(n, np.float32)], ids=["torch", "numpy"])
@pytest.mark.parametrize("second", [torch.float64, torch.float32], ids=["both converted", "one converted"])
def test_views_that_share_memory_in_part_are_refused_where_their_dtype_changes(tmp_path, make, second):
    ce.save(tmp_path / "point", {"a": torch.zeros(4).double(), "b": torch.ones(4, dtype=second)})
    whole = make(6)
    with pytest.raises(LoadMismatchError, match="b: shares memory with a here, and `cast` converts"):
        ce.load(tmp_path / "point", into={"a": whole[:4], "b": whole[2:]}, cast=True, verify=False)
    assert not any(whole)
    report = ce.load(tmp_path / "point", into={"a": whole[:4], "b": whole[2:]}, cast=True, strict=False)
    assert report.loaded == ("a",)
    assert not any(whole)


def test_columns_of_one_matrix_and_tied_leaves_may_change_their_dtype(tmp_path):
    fused, tied = torch.randn(6, 9).double(), torch.randn(3).double()
    ce.save(tmp_path / "point", {"q": fused[:, :3], "k": fused[:, 3:], "a": tied, "b": tied})
    fresh, one = torch.zeros(6, 9), torch.zeros(3)
    ce.load(tmp_path / "point", into={"q": fresh[:, :3], "k": fresh[:, 3:], "a": one, "b": one}, cast=True)
    assert torch.equal(fresh, fused.float())
    assert torch.equal(one, tied.float())


def test_a_leaf_is_looked_at_where_one_of_the_same_dotted_name_was_converted(tmp_path):
    class Doubles(Holder):
        """Writes into what lies under `a`, then `b`."""

        def load_state_dict(self, state):
            other["b"].mul_(2)

    other = {"b": torch.zeros(2)}
    ce.save(tmp_path / "point", {"a.b": torch.ones(2).double(), "a": {"b": torch.ones(2)}, "o": Doubles({"n": 1})})
    with pytest.raises(RestoreDifferenceError, match=r"a\.b: other contents now"):
        ce.load(tmp_path / "point", into={"a.b": torch.zeros(2), "a": other, "o": Doubles({"n": 1})}, cast=True)


# What containers are, at each save.


def with_metadata(version):
    result = OrderedDict(a=torch.zeros(2))
    if version is not None:
        result._metadata = {"": {"version": version}}
    return result


TENSOR = torch.zeros(2)

CHANGES = {
    "a deque gets a length": (deque([TENSOR]), deque([TENSOR], 3)),
    "a deque loses its length": (deque([TENSOR], 3), deque([TENSOR])),
    "a deque's length": (deque([TENSOR], 5), deque([TENSOR], 3)),
    "a factory": (defaultdict(list, a=TENSOR), defaultdict(int, a=TENSOR)),
    "1 becomes 1.0": ({1: TENSOR}, {1.0: TENSOR}),
    "1 becomes True": ({1: TENSOR}, {True: TENSOR}),
    "1.0 becomes 1": ({1.0: TENSOR}, {1: TENSOR}),
    "a zero's sign": ({0.0: TENSOR}, {-0.0: TENSOR}),
    "inside a tuple": ({(1,): TENSOR}, {(True,): TENSOR}),
    "a number of numpy's": ({1: TENSOR}, {np.int64(1): TENSOR}),
    "versions": (with_metadata(1), with_metadata(2)),
    "versions appear": (with_metadata(None), with_metadata(1)),
    "versions go": (with_metadata(1), with_metadata(None)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("wrap", [lambda value: value, Holder, ce.PerRank], ids=["plain", "object", "per rank"])
def test_a_later_save_has_the_containers_of_that_save(change, wrap):
    reader = StateReader()
    for value in CHANGES[change]:
        state = {"x": wrap(value)}
        now, fresh = reader.read(state).plain, flatten(state)
        assert repr((now.containers, now.rank_containers)) == repr((fresh.containers, fresh.rank_containers))
        assert repr((now.outline, now.rank_outline)) == repr((fresh.outline, fresh.rank_outline))


def test_versions_that_are_changed_in_place_are_saved(tmp_path):
    state = {"x": Holder(with_metadata(1))}
    saved = ce.Checkpointer(tmp_path / "run", every=1)
    saved.step(1, state)
    state["x"].state._metadata[""]["version"] = 2
    saved.step(2, state)
    saved.close()
    fresh = {"x": Holder({})}
    ce.Checkpointer(tmp_path / "run").restore(fresh)
    assert fresh["x"].state._metadata == {"": {"version": 2}}


@pytest.mark.parametrize("wrap", [lambda value: value, Holder], ids=["plain", "object"])
@pytest.mark.parametrize("saved", [None, 1])
@pytest.mark.parametrize("here", [None, 7])
def test_an_ordered_dict_has_the_versions_that_were_saved_or_none(tmp_path, wrap, saved, here):
    ce.save(tmp_path / "point", {"x": wrap(with_metadata(saved))})
    fresh = {"x": wrap(with_metadata(here))}
    ce.load(tmp_path / "point", into=fresh)
    value = fresh["x"].state if wrap is Holder else fresh["x"]
    assert getattr(value, "_metadata", None) == getattr(with_metadata(saved), "_metadata", None)


# Optimizers.


def named_adam(order, model=None):
    parameters = {name: nn.Parameter(torch.ones(2)) for name in "ab"} if model is None else dict(model)
    return parameters, torch.optim.Adam([(name, parameters[name]) for name in order])


def stepped(order, **more):
    parameters, optimizer = named_adam(order, **more)
    (parameters["a"].sum() + 3 * parameters["b"].sum()).backward()
    optimizer.step()
    return parameters, optimizer


def test_an_optimizer_alone_refuses_parameters_of_other_names_under_the_same_numbers(tmp_path):
    ce.save(tmp_path / "point", {"optimizer": stepped("ab")[1]})
    with pytest.raises(LoadMismatchError, match=r"parameter 0\.0 is called 'b' here, 'a' in the checkpoint"):
        ce.load(tmp_path / "point", into={"optimizer": named_adam("ba")[1]})
    parameters, fresh = named_adam("ab")
    ce.load(tmp_path / "point", into={"optimizer": fresh})
    assert fresh.state[parameters["b"]]["exp_avg"][0].item() == pytest.approx(0.3)


def test_names_given_to_an_optimizer_stay_with_their_parameters_in_another_order(tmp_path):
    saved = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    ce.save(tmp_path / "point", {"model": saved, "optimizer": stepped("ab", model=saved.items())[1]})
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    _, fresh = named_adam("ba", model.items())
    ce.load(tmp_path / "point", into={"model": model, "optimizer": fresh})
    assert fresh.param_groups[0]["param_names"] == ["b", "a"]
    assert fresh.state[model["a"]]["exp_avg"][0].item() == pytest.approx(0.1)


def test_parameters_that_were_saved_by_number_are_refused_under_names_in_another_order(tmp_path):
    ce.save(tmp_path / "old", {"optimizer": stepped("ab")[1]})  # as older versions did beside a dict of parameters
    parameters, fresh = named_adam("ba")
    with pytest.raises(LoadMismatchError, match=r"parameter p\.b is called 'b' here, 'a' in the checkpoint"):
        ce.load(tmp_path / "old", into={"p": parameters, "optimizer": fresh}, only=["optimizer"])
    parameters, fresh = named_adam("ab")
    ce.load(tmp_path / "old", into={"p": parameters, "optimizer": fresh}, only=["optimizer"])
    assert fresh.state[parameters["b"]]["exp_avg"][0].item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    "placed",
    [
        lambda a, b: {"p": {"x": {"w": a}, "x.w": b}},
        lambda a, b: {"p": {"0": a, 0: b}},
        lambda a, b: {0: [b, a]},
    ],
    ids=["dots", "int and str", "like numbers"],
)
@pytest.mark.parametrize("old", [True, False])
def test_parameters_whose_names_read_alike_go_by_number(tmp_path, placed, old):
    a, b = stepped("ab")[0].values()  # with gradients
    optimizer = torch.optim.Adam([a, b])
    optimizer.step()
    ce.save(tmp_path / "point", {"optimizer": optimizer} if old else {"optimizer": optimizer, **placed(a, b)})
    one, other = (nn.Parameter(torch.ones(2)) for _ in "ab")
    fresh = torch.optim.Adam([one, other])
    ce.load(tmp_path / "point", into={"optimizer": fresh, **placed(one, other)}, only=["optimizer"])
    assert torch.equal(fresh.state[one]["exp_avg"], optimizer.state[a]["exp_avg"])
    assert torch.equal(fresh.state[other]["exp_avg"], optimizer.state[b]["exp_avg"])


def test_names_that_only_a_wrapper_has_changed_are_the_same_names(tmp_path):
    parameters, optimizer = stepped("ab")
    ce.save(tmp_path / "point", {"optimizer": optimizer})
    wrapped = [(f"module.{name}", nn.Parameter(torch.ones_like(parameters[name]))) for name in "ab"]
    fresh = torch.optim.Adam(wrapped)
    ce.load(tmp_path / "point", into={"optimizer": fresh})
    assert torch.equal(fresh.state[wrapped[1][1]]["exp_avg"], optimizer.state[parameters["b"]]["exp_avg"])


class OnlyLoads(torch.optim.SGD):
    """Has a `load_state_dict` of its own alone."""

    def load_state_dict(self, state):
        super().load_state_dict(state)


@pytest.mark.parametrize("cls", [torch.optim.SGD, OnlyLoads])
@pytest.mark.parametrize("rates", [(0.5, 0.75), (0.5, 0.5)])
def test_groups_that_share_a_rate_tensor_take_saved_numbers_whoever_loads_them(tmp_path, cls, rates):
    def groups(*rates):
        return cls([{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates], lr=0.1, momentum=0.9)

    ce.save(tmp_path / "point", {"optimizer": groups(*rates)})
    shared = torch.tensor(0.125)
    fresh = groups(shared, shared)
    ce.load(tmp_path / "point", into={"optimizer": fresh})
    assert tuple(float(group["lr"]) for group in fresh.param_groups) == rates


# Parameters outside of modules.


@pytest.mark.parametrize("wrap", [lambda value: value, ce.PerRank], ids=["shared", "per rank"])
@pytest.mark.parametrize("here", ["nothing", "a tensor", "a parameter", "another shape"])
def test_a_parameter_in_an_object_comes_back_as_one_whatever_was_there(tmp_path, wrap, here):
    ones = torch.ones(2)
    saved = Holder({"taught": nn.Parameter(ones), "frozen": [nn.Parameter(ones * 2, False)], "plain": ones * 3})
    ce.save(tmp_path / "point", {"x": wrap(saved)})
    make = {
        "a tensor": lambda: torch.zeros(2),
        "a parameter": lambda: nn.Parameter(torch.zeros(2)),
        "another shape": lambda: nn.Parameter(torch.zeros(3)),
    }.get(here)
    fresh = Holder({} if make is None else {"taught": make(), "frozen": [make()]})
    ce.load(tmp_path / "point", into={"x": wrap(fresh)})
    taught, (frozen,), plain = fresh.state["taught"], fresh.state["frozen"], fresh.state["plain"]
    assert [type(one) for one in (taught, frozen, plain)] == [nn.Parameter, nn.Parameter, torch.Tensor]
    assert [one.requires_grad for one in (taught, frozen, plain)] == [True, False, False]
    assert [one.tolist() for one in (taught, frozen, plain)] == [[1, 1], [2, 2], [3, 3]]


def test_a_parameter_that_is_frozen_between_saves_is_saved_as_frozen():
    parameter = nn.Parameter(torch.ones(2))
    reader = StateReader()
    for grad in (True, False):
        parameter.requires_grad_(grad)
        assert reader.read({"x": Holder({"p": parameter})}).plain.outline.kinds == {("x", "p"): grad}


# Objects all of whose state is the rank's own.


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (np.arange(3.0), np.zeros(3)),
        ({"a": 1, "b": np.ones(2)}, {"a": 0, "b": np.zeros(2)}),
        ({"a": 1}, {}),
        (5, 6),
        ([1, 2], None),
    ],
    ids=["array", "dict", "dict here empty", "number", "list"],
)
def test_an_object_whose_whole_state_is_per_rank_gets_it_back(tmp_path, saved, here):
    ce.save(tmp_path / "point", {"o": Holder(ce.PerRank(saved))})
    holder = Holder(ce.PerRank(here))
    ce.load(tmp_path / "point", into={"o": holder})
    np.testing.assert_equal(holder.state, saved)
    assert type(holder.state) is type(saved)


@pytest.mark.parametrize("state", [[ce.PerRank(1)], {"a": (ce.PerRank(1),)}], ids=["list", "tuple in a dict"])
def test_a_per_rank_that_no_load_could_find_is_refused_at_the_save(tmp_path, state):
    with pytest.raises(StateError, match=r"^o\..*put the whole list into a PerRank, or have state_dict"):
        ce.save(tmp_path / "point", {"o": Holder(state)})


def test_an_object_that_gives_another_one_in_a_per_rank_is_refused_at_the_save(tmp_path):
    with pytest.raises(StateError, match=r"o: state_dict\(\) of .*Holder gives a .*Holder itself"):
        ce.save(tmp_path / "point", {"o": Holder(ce.PerRank(Holder({"a": 1})))})


@pytest.mark.parametrize(
    "build",
    [
        lambda n: {"b": ce.PerRank(n), "a": n},
        lambda n: OrderedDict(z=ce.PerRank(np.full(2, n)), a=ce.PerRank(n)),
        lambda n: {"x": defaultdict(list, {"c": ce.PerRank([n]), "b": np.full(2, n)}), "a": n},
        lambda n: {1.5: ce.PerRank(n), (1, "x"): {None: ce.PerRank({"k": n})}},
    ],
    ids=["order", "all per rank", "in a defaultdict", "odd keys"],
)
def test_parts_of_an_objects_state_that_are_per_rank_come_back_in_their_place(tmp_path, build):
    ce.save(tmp_path / "point", {"o": Keeper(build(1))})
    keeper = Keeper(build(2))
    ce.load(tmp_path / "point", into={"o": keeper})
    Oracle().same(build(1), keeper.state, "")


@pytest.mark.parametrize("wrap", [ce.PerRank, lambda value: {"a": ce.PerRank(value)}], ids=["whole", "in part"])
def test_an_object_of_another_class_with_nothing_but_a_per_rank_is_refused(tmp_path, wrap):
    ce.save(tmp_path / "point", {"o": Holder(wrap(1))})
    with pytest.raises(LoadMismatchError, match=r"o: .*Holder in the checkpoint, .*Keeper here"):
        ce.load(tmp_path / "point", into={"o": Keeper(wrap(2))})


def test_optimizers_under_keys_that_look_the_same_keep_their_states(tmp_path):
    def stepped(number):
        layers = {0: nn.Conv2d(3, 2, 2), "0": nn.Linear(2, 2)}
        parts = {
            key: {"model": net, "optimizer": torch.optim.Adafactor(net.parameters())} for key, net in layers.items()
        }
        for part in parts.values():
            for parameter in part["model"].parameters():
                parameter.grad = torch.full_like(parameter, float(number))
            part["optimizer"].step()
        return parts

    saved, fresh = stepped(1), stepped(2)
    ce.save(tmp_path / "point", saved)
    ce.load(tmp_path / "point", into=fresh)
    Oracle().same(saved, fresh, "")


@pytest.mark.parametrize(
    ("rate", "cast", "tensor"), [(0.1, False, False), (0.1, True, True), (0.25, False, True)], ids=str
)
def test_a_rate_that_a_tensor_here_cannot_hold_comes_back_as_the_number_that_it_was(tmp_path, rate, cast, tensor):
    """Schedulers of torch before 2.13 put a number where the optimizer had a tensor."""
    model = nn.Linear(2, 2)
    ce.save(tmp_path / "point", {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=rate)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    ce.load(tmp_path / "point", into={"model": model, "optimizer": optimizer}, cast=cast)
    found = optimizer.param_groups[0]["lr"]
    assert isinstance(found, torch.Tensor) == tensor
    assert found == (torch.tensor(rate) if tensor else rate)
