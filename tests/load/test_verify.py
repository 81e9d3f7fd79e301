"""The look after a load finds each kind of fault, also where what keeps it from happening is taken out."""

import copy
import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch
from holders import Changing, Holder

import ckptengine as ce
from ckptengine.errors import RestoreDifferenceError
from ckptengine.load import loader
from ckptengine.state.bind.base import BinderBase
from ckptengine.state.bind.optimizers import OptimizerBinder
from ckptengine.state.bind.tensors import TensorBinder
from ckptengine.state.bind.work import Work


def trained(kind=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def fresh(kind=torch.optim.AdamW, **options):
    model = torch.nn.Linear(4, 4)
    return {"model": model, "optimizer": kind(model.parameters(), **options)}


def refused(match):
    return pytest.raises(RestoreDifferenceError, match=match)


# What the state's own code does.


def drop(state):
    return {key: value for key, value in state.items() if key != "t"}


def to_half(state):
    return {**state, "t": state["t"].half()}


def one_element(state):
    state["t"].data.view(-1)[12345] += 1
    return state


def one_element_of_a_copy(state):
    other = state["t"].clone()
    other.view(-1)[12345] += 1
    return {**state, "t": other}


def numpy_element(state):
    state["a"][777] = -1.0
    return state


def reshape(state):
    return {**state, "t": state["t"].view(-1)}


def other_value(state):
    return {**state, "n": {"deep": [1, 2.0]}}


def as_tuple(state):
    return {**state, "items": tuple(state["items"])}


def more(state):
    return {**state, "extra": torch.ones(2)}


def as_list(state):
    return {**state, "a": state["a"].tolist()}


def other_order(state):
    return {**state, "ordered": OrderedDict(reversed(state["ordered"].items()))}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop, r"held.t: float32 of shape \(400, 100\) in the checkpoint, nothing now"),
        (to_half, r"held.t: float32 of shape \(400, 100\) in the checkpoint, float16 of shape \(400, 100\) now"),
        (one_element, r"held.t: other contents now than in the checkpoint, float32 of shape \(400, 100\)"),
        (one_element_of_a_copy, "held.t: other contents now than in the checkpoint"),
        (numpy_element, "held.a: other contents now than in the checkpoint"),
        (reshape, r"held.t: .*\(40000,\) now"),
        (other_value, r"held.n.deep: \[1, 2\] in the checkpoint, \[1, 2.0\] now"),
        (as_tuple, "held.items: a list in the checkpoint, a tuple now"),
        (more, "held.extra: not in the checkpoint, here now"),
        (as_list, "held.a: float64 of shape .* in the checkpoint, list now"),
        (other_order, "held.ordered: the order of the keys is not that of the checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_an_object_makes_of_its_state_is_told(tmp_path, change, match):
    def state(held):
        return {"held": Changing(change, **held)}

    ordered = OrderedDict([("z", torch.ones(1)), ("b", torch.zeros(1))])
    values = {"t": torch.randn(400, 100), "a": np.arange(1000.0), "n": {"deep": [1, 2]}}
    ce.save(tmp_path / "point", state({**values, "items": [torch.ones(1), 5], "ordered": ordered}))
    with refused(match) as caught:
        ce.load(tmp_path / "point", into=state({}))
    assert str(tmp_path / "point") in str(caught.value)
    assert "rank 0" in str(caught.value)
    assert "Don't train on with it" in str(caught.value)
    ce.load(tmp_path / "point", into=state({}), verify=False)


@pytest.mark.parametrize("how", ["add_", "data", "whole"])
def test_an_object_that_writes_into_the_model_is_found(tmp_path, how):
    state = trained()

    def write(held):
        weight = here["model"].weight
        with torch.no_grad():
            if how == "add_":
                weight[0, 0].add_(1)
            elif how == "data":
                weight.data.numpy()[:] = 5
            else:
                weight.copy_(weight + 1)
        return held

    ce.save(tmp_path / "point", {**state, "held": Changing(write, n=1)})
    here = {**fresh(), "held": Changing(write)}
    with refused("model.weight: other contents now than in the checkpoint"):
        ce.load(tmp_path / "point", into=here)


def test_an_object_that_keeps_copies_or_writes_equal_bytes_is_exact(tmp_path):
    def copies(state):
        with torch.no_grad():
            here["model"].weight.copy_(here["model"].weight.clone())
        return copy.deepcopy(state)

    state = trained()
    ce.save(tmp_path / "point", {**state, "held": Changing(copies, t=torch.randn(50), a=np.arange(3), n=1)})
    here = {**fresh(), "held": Changing(copies)}
    ce.load(tmp_path / "point", into=here)
    assert torch.equal(here["model"].weight, state["model"].weight)


class Deriving(Changing):
    def rederived_state(self, saved_world_size, world_size):
        return ["started", ("inner", "seen")]


def test_what_an_object_says_it_derives_anew_is_not_compared(tmp_path):
    def change(state):
        return {**state, "started": 2, "inner": {**state["inner"], "seen": 2, **extra}}

    extra = {}
    state = {"started": 1, "inner": {"seen": 1, "kept": 1}}
    ce.save(tmp_path / "point", {"held": Deriving(change, **state)})
    ce.load(tmp_path / "point", into={"held": Deriving(change)})
    extra["kept"] = 3
    with refused("held.inner.kept: 1 in the checkpoint, 3 now"):
        ce.load(tmp_path / "point", into={"held": Deriving(change)})


class Around:
    """An object of a user's own around a sampler and the random streams."""

    def __init__(self, **options):
        self.sampler, self.rng = ce.ElasticSampler(20, **options), ce.RNG()

    def state_dict(self):
        return {"data": self.sampler.state_dict(), "rng": self.rng.state_dict()}

    def load_state_dict(self, state):
        self.sampler.load_state_dict(state["data"])
        self.rng.load_state_dict(state["rng"])


@pytest.mark.parametrize("batch", [6, 10])
def test_an_object_around_a_sampler_and_random_streams_is_restored_also_with_another_batch(tmp_path, batch):
    saved = Around(global_batch=6, last="drop")
    batches = saved.sampler.batches()
    used = [*next(batches), *next(batches)]
    ce.save(tmp_path / "point", {"around": saved})
    here = Around(global_batch=batch, last="drop")
    ce.load(tmp_path / "point", into={"around": here})
    loaded = here.sampler.state_dict()
    assert {**loaded, "digest": None} == {**saved.sampler.state_dict(), "digest": None}
    assert loaded["digest"].value == saved.sampler.state_dict()["digest"].value
    # Of the 8 that are left 6 make a batch; with batches of 10 they are left out, and the next epoch begins.
    assert here.sampler.epoch == (0 if batch == 6 else 1)
    rest = next(here.sampler.batches())
    assert len(rest) == batch
    assert batch == 10 or not {*used} & {*rest}
    after = here.sampler.state_dict()
    assert (after["life"], after["global_batch"]) == (1, batch)


def test_a_value_that_an_object_had_before_and_the_checkpoint_has_not_is_told_and_stays(tmp_path, caplog):
    class Newer(Holder):
        def load_state_dict(self, state):
            self.state.update(state)

    ce.save(tmp_path / "point", {"held": Holder(a=1)})
    Newer.__qualname__, Newer.__module__ = Holder.__qualname__, Holder.__module__
    with caplog.at_level(logging.WARNING, "ckptengine"):
        ce.load(tmp_path / "point", into={"held": Newer(a=0, b=2)})
    assert "1 value(s) of objects are newer than the checkpoint and were left as they are: held.b" in caplog.text


def test_warm_start_and_restore_look_too_and_only_at_what_was_loaded(tmp_path):
    state = {**trained(), "held": Changing(lambda state: {"n": 2}, n=1)}
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(3, state).durable.result()
    here = {**fresh(), "held": Changing(lambda state: {"n": 2})}
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        with refused("held.n: 1 in the checkpoint, 2 now"):
            ckpt.restore(here)
        assert ckpt.restore(here, only=["model", "optimizer"]) == 3
        assert ckpt.restore(here, verify=False) == 3
    with ce.Checkpointer(tmp_path / "other") as ckpt:
        assert ckpt.warm_start(tmp_path / "run", here).loaded
        with refused("held.n: 1 in the checkpoint, 2 now"):
            ckpt.warm_start(tmp_path / "run", here, only=["held"])


def test_many_differences_are_told_in_a_few_lines(tmp_path):
    held = {f"t{number}": torch.ones(2) for number in range(500)}
    ce.save(tmp_path / "point", {"held": Changing(lambda state: {}, **held)})
    with refused("501 things differ") as caught:
        ce.load(tmp_path / "point", into={"held": Changing(lambda state: {})})
    assert "and 493 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 15


# What the engine does, with that which keeps it right taken out.


def test_two_leaves_in_one_memory_are_found_without_the_check_at_binding(tmp_path, monkeypatch):
    monkeypatch.setattr(Work, "separate", lambda self, same, found: None)
    ce.save(tmp_path / "point", {"a": torch.zeros(9), "b": torch.ones(9)})
    tensor = torch.full((9,), 3.0)
    with refused(r"[ab]: other contents now than in the checkpoint"):
        ce.load(tmp_path / "point", into={"a": tensor, "b": tensor})
    base = torch.zeros(12)
    with refused(r"[ab]: other contents now than in the checkpoint"):
        ce.load(tmp_path / "point", into={"a": base[:9], "b": base[3:]})


def test_an_object_tied_to_the_model_is_found_without_memory_of_its_own(tmp_path, monkeypatch):
    def reuse(self, like, adapter, view, entry, path):
        self._read(like, adapter, view, entry, path)
        return like

    monkeypatch.setattr(TensorBinder, "_rebuild_like", reuse)
    monkeypatch.setattr(Work, "separate", lambda self, same, found: None)
    model = torch.nn.Linear(3, 3)
    best = {key: torch.full_like(value, 7) for key, value in model.state_dict().items()}
    ce.save(tmp_path / "point", {"model": model, "held": Holder(best=best)})
    other = torch.nn.Linear(3, 3)
    with refused("other contents now than in the checkpoint"):
        ce.load(tmp_path / "point", into={"model": other, "held": Holder(best=other.state_dict())})


def test_another_class_is_found_without_the_check_at_binding(tmp_path, monkeypatch):
    monkeypatch.setattr(BinderBase, "_another_class", lambda self, value, path, node: False)
    ce.save(tmp_path / "point", trained())
    with refused("optimizer: torch.optim.adamw.AdamW in the checkpoint, torch.optim.sgd.SGD now"):
        ce.load(tmp_path / "point", into=fresh(torch.optim.SGD))


def test_another_order_of_keys_is_found(tmp_path, monkeypatch):
    rebuild = TensorBinder._rebuild

    def sorted_rebuild(self, node, *args):
        node.children = dict(sorted(node.children.items()))
        return rebuild(self, node, *args)

    monkeypatch.setattr(TensorBinder, "_rebuild", sorted_rebuild)
    ce.save(tmp_path / "point", {"held": Holder(z=torch.ones(1), a=OrderedDict(q=torch.ones(1), b=torch.ones(1)))})
    with monkeypatch.context() as patch:
        patch.setattr(loader, "describe", _forgetting_order(loader.describe))
        ce.load(tmp_path / "point", into={"held": Holder()})  # an old checkpoint: nobody can say
    state = OptimizerBinder._bind_parameter_state

    def sorted_state(self, *args):
        return dict(sorted(state(self, *args).items()))

    monkeypatch.setattr(OptimizerBinder, "_bind_parameter_state", sorted_state)
    ce.save(tmp_path / "trained", trained())
    with refused("optimizer.state.model.weight: the order of the keys is not that of the checkpoint"):
        ce.load(tmp_path / "trained", into=fresh())


def _forgetting_order(describe):
    def forget(checkpoint):
        from dataclasses import replace

        return replace(describe(checkpoint), outline=None, rank_outlines=())

    return forget


def test_another_memory_layout_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("ckptengine.state.bind.tensors.in_order", lambda view, order: True)
    held = {"basis": torch.linalg.eigh(torch.eye(3) * torch.arange(3)).eigenvectors}
    assert not held["basis"].is_contiguous()
    ce.save(tmp_path / "point", {"held": Holder(**held)})
    with refused(r"held.basis: dimensions \(1, 0\), outermost first in the checkpoint, another memory layout now"):
        ce.load(tmp_path / "point", into={"held": Holder()})


def test_a_dict_in_the_place_of_a_live_object_is_found(tmp_path):
    class Warmup(Holder):
        """Holds another object, and takes what it is given in its place."""

        def load_state_dict(self, state):
            self.state = {**state, "after": {"rate": 5.0}}

    after = Holder(rate=1.0)
    ce.save(tmp_path / "point", {"warmup": Warmup(after={"rate": after.state["rate"]})})
    with refused("warmup.after.rate: 1.0 in the checkpoint, 5.0 now"):
        ce.load(tmp_path / "point", into={"warmup": Warmup()})


def test_state_that_an_optimizer_of_its_own_drops_is_found(tmp_path, monkeypatch):
    ce.save(tmp_path / "point", trained())
    state = OptimizerBinder._bind_parameter_state

    def forgetful(self, *args):
        return {key: value for key, value in state(self, *args).items() if key != "exp_avg"}

    monkeypatch.setattr(OptimizerBinder, "_bind_parameter_state", forgetful)
    with refused("optimizer.state.model.weight.exp_avg: float32 of shape .* in the checkpoint, nothing now"):
        ce.load(tmp_path / "point", into=fresh())


def test_values_and_objects_that_are_not_handed_over_are_found(tmp_path, monkeypatch):
    ce.save(tmp_path / "point", {"held": Holder(n=1), "step": 5})
    bind = Work.act

    def no_objects(self, phase, action):
        if phase != 3:
            bind(self, phase, action)

    monkeypatch.setattr(Work, "act", no_objects)
    with refused("held.n: 1 in the checkpoint, 0 now"):
        ce.load(tmp_path / "point", into={"held": Holder(n=0), "step": 0})
    monkeypatch.setattr(Work, "act", lambda self, phase, action: None)
    with refused("step: 5 in the checkpoint, 0 now"):
        ce.load(tmp_path / "point", into={"held": Holder(n=1), "step": 0})
