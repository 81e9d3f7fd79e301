"""With what keeps a kind of fault from happening taken out, the look after a load finds it."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from holders import Changing, Holder
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, RestoreDifferenceError
from ckptengine.state.bind import modules, own_calls
from ckptengine.state.bind.tensors import TensorBinder
from ckptengine.torch.adapter import TorchAdapter


def refused(match):
    return pytest.raises(RestoreDifferenceError, match=match)


# Optimizers with calls of their own.


class Masters(torch.optim.SGD):
    """Keeps 64-bit copies of its parameters, and gives them as part of its `state_dict`."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.masters = [parameter.detach().double() for group in self.param_groups for parameter in group["params"]]

    def state_dict(self):
        return {**super().state_dict(), "masters": self.masters}

    def load_state_dict(self, state):
        state = dict(state)
        self.masters = state.pop("masters")
        super().load_state_dict(state)


def trained(make):
    model = nn.Linear(4, 4)
    optimizer = make(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def fresh(make):
    model = nn.Linear(4, 4)
    return {"model": model, "optimizer": make(model.parameters())}


def test_an_optimizer_s_own_load_state_dict_that_is_bypassed_is_found(tmp_path, monkeypatch):
    ce.save(tmp_path / "point", trained(Masters))
    ce.load(tmp_path / "point", into=fresh(Masters))
    monkeypatch.setattr(own_calls, "hand_over", lambda *given: None)
    with refused(r"optimizer.state.model.weight.momentum_buffer: float32 of shape \(4, 4\) in the checkpoint, nothing"):
        ce.load(tmp_path / "point", into=fresh(Masters))


def test_an_optimizer_that_is_loaded_without_what_it_says_of_itself_is_found(tmp_path, monkeypatch):
    ce.save(tmp_path / "point", trained(Masters))
    bind = TorchAdapter.saves_itself
    asked = []

    def at_the_walk_only(self, optimizer):
        asked.append(optimizer)
        return bind(self, optimizer) and len(asked) > 2  # the look asks later than the binding

    monkeypatch.setattr(TorchAdapter, "saves_itself", at_the_walk_only)
    with pytest.raises((RestoreDifferenceError, LoadMismatchError), match="optimizer.masters"):
        ce.load(tmp_path / "point", into=fresh(Masters))


# Modules with code of their own.


class Scaled(nn.Linear):
    """Has state that is no tensor of its own."""

    scale = 1.0

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


class Packed(nn.Linear):
    """Gives an offset with its state, as layers of few bits do, and forgets to take it."""

    def __init__(self, offset):
        super().__init__(3, 3)
        self.offset = offset

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}offset"] = torch.tensor(self.offset)


def test_a_module_s_own_loading_code_that_is_passed_over_is_found(tmp_path, monkeypatch):
    saved = Scaled(3, 3)
    saved.scale = 8.0
    ce.save(tmp_path / "point", {"model": saved})
    monkeypatch.setattr(modules, "hand_over", lambda *given: None)
    with refused("model._extra_state.*8.0.* in the checkpoint, .*1.0.* now"):
        ce.load(tmp_path / "point", into={"model": Scaled(3, 3)})


def test_a_key_that_a_module_does_not_take_is_found_where_nobody_asks_it(tmp_path, monkeypatch):
    ce.save(tmp_path / "point", {"model": Packed(5.0)})
    with pytest.raises(LoadMismatchError, match="did not take offset"):
        ce.load(tmp_path / "point", into={"model": Packed(1.0)})
    load = TorchAdapter.load_module
    monkeypatch.setattr(TorchAdapter, "load_module", lambda *given: load(*given) and ())
    with refused("model.offset: other contents now than in the checkpoint"):
        ce.load(tmp_path / "point", into={"model": Packed(1.0)})


def test_a_module_s_code_that_leaves_another_weight_is_found(tmp_path):
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *more):
            super()._load_from_state_dict(state, prefix, *more)
            self.weight = nn.Parameter(self.weight.detach() * 2)

    ce.save(tmp_path / "point", {"model": Doubling(3, 3)})
    with refused("model.weight: other contents now than in the checkpoint"):
        ce.load(tmp_path / "point", into={"model": Doubling(3, 3)})


# Objects inside of objects, and random numbers.


class Rate:
    def __init__(self, rate):
        self.rate = rate

    def state_dict(self):
        return {"rate": self.rate}

    def load_state_dict(self, state):
        self.rate = state["rate"]


class Level(Rate):
    """Its state is one number."""

    def state_dict(self):
        return self.rate

    def load_state_dict(self, state):
        self.rate = state


@pytest.mark.parametrize(("kind", "found"), [(Rate, "a dict"), (Level, "float")])
def test_a_value_that_takes_the_place_of_a_live_object_is_found(tmp_path, monkeypatch, kind, found):
    ce.save(tmp_path / "point", {"warmup": Holder(after=kind(1.0), n=1, t=torch.ones(1))})
    ce.load(tmp_path / "point", into={"warmup": Holder(after=kind(2.0), n=2)})
    monkeypatch.setattr(TensorBinder, "_rebuild_item", TensorBinder._rebuild)
    monkeypatch.setattr(TensorBinder, "_look_for_live", lambda *given: None)
    with refused(rf"warmup.after: .*{kind.__name__} in the checkpoint, {found} in its place now"):
        ce.load(tmp_path / "point", into={"warmup": Holder(after=kind(2.0), n=2)})


def test_random_numbers_that_an_object_draws_while_it_is_loaded_are_found(tmp_path):
    def draw(state):
        torch.rand(1)
        return state

    ce.save(tmp_path / "point", {"rng": ce.RNG(), "held": Changing(draw, n=1)})
    with refused("rng"):
        ce.load(tmp_path / "point", into={"rng": ce.RNG(), "held": Changing(draw)})


def test_the_look_asks_each_object_once(tmp_path):
    class Counting(Holder):
        asked = 0

        def state_dict(self):
            Counting.asked += 1
            return self.state

    ce.save(tmp_path / "point", {"held": Counting(n=1), "inside": {"other": Counting(n=2)}})
    for verify, calls in ((True, 4), (False, 2)):
        Counting.asked = 0
        ce.load(tmp_path / "point", into={"held": Counting(), "inside": {"other": Counting()}}, verify=verify)
        assert Counting.asked == calls


# Sharded tensors.


@pytest.fixture
def one_rank():
    """Form a process group of one rank, in which tensors can be sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


class Blocks(torch.optim.SGD):
    """Keeps tensors in a list of each parameter's state."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["blocks"] = [parameter.detach() * 2, parameter.detach() * 3]


def sharded(*, steps):
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model)
    optimizer = Blocks(model.parameters(), lr=0.1)
    for _ in range(steps):
        model.weight.grad = model.weight.detach() * 0.5
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("taken_out", ["check", "both"])
def test_whole_copies_in_a_list_of_a_sharded_parameter_s_state_are_found(tmp_path, monkeypatch, one_rank, taken_out):
    ce.save(tmp_path / "point", sharded(steps=1))
    here = sharded(steps=0)
    ce.load(tmp_path / "point", into=here)
    blocks = here["optimizer"].state[here["model"].weight]["blocks"]
    assert all(isinstance(one, DTensor) for one in blocks)
    make = TorchAdapter.new_state_tensor
    monkeypatch.setattr(TorchAdapter, "new_state_tensor", lambda *args, **more: make(*args, **more).full_tensor())
    if taken_out == "both":
        monkeypatch.setattr(TorchAdapter, "check_parameter_state", lambda *given: None)
        monkeypatch.setattr(TorchAdapter, "check_optimizer", lambda *given: None)
    with refused("optimizer"):
        ce.load(tmp_path / "point", into=sharded(steps=0))
