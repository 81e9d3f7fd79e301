"""A state is walked once and then compared: whatever has changed in between is seen, whatever has not costs nothing."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch

import ckptengine as ce
from ckptengine.save.reading import StateReader
from ckptengine.state.tree import flatten


class Average:
    """An object with `state_dict` that gives new tensors each time."""

    def __init__(self):
        self.values = {"w": torch.zeros(3)}

    def state_dict(self):
        return {name: value.clone() for name, value in self.values.items()}

    def load_state_dict(self, state):
        self.values = state


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "average": Average(),
        "fresh": dict(model.state_dict()),
        "array": np.arange(6.0).reshape(2, 3),
        "sharded": ce.ShardedArray(torch.arange(4.0), (4,), (0,)),
        "own": ce.PerRank({"counts": np.arange(3), "seed": 5}),
        "items": [torch.ones(2), {"deep": torch.zeros(2, 2)}, 7],
        "plain": {"epoch": 1, "names": ["a", "b"]},
        "tied": {"a": torch.ones(5), "b": torch.zeros(5)},
    }


def step(model, optimizer):
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def expected(state):
    """Return what a fresh walk finds: structure, and the bytes of each array."""
    flat = flatten(state)
    return flat.values, flat.rank_values, flat.aliases, flat.containers, arrays_of(flat.arrays)


def arrays_of(leaves):
    result = {}
    for leaf in leaves:
        boxes = [(part.box, memory_of(leaf, part)) for part in leaf.parts]
        result[leaf.path] = (leaf.dtype, leaf.shape, leaf.placement, leaf.container, boxes)
    return result


def memory_of(leaf, part):
    memory = part.memory
    return memory.address, memory.strides, memory.low, memory.nbytes


def seen(reading, known):
    """Return the same of a reading, given the arrays of the reading before."""
    plain = reading.plain
    if reading.moved is None:
        arrays = arrays_of(reading.leaves)
    else:
        arrays = dict(known)
        for number, parts in reading.moved.items():
            leaf = list(arrays)[number]
            head = arrays[leaf][:-1]
            arrays[leaf] = (*head, [(part.box, memory_of(None, part)) for part in parts])
    return plain.values, plain.rank_values, plain.aliases, plain.containers, arrays


def transpose(state):
    state["items"][1]["deep"].t_()


def new_memory(state):
    state["model"][0].weight.data = state["model"][0].weight.detach().clone()


def other_dtype(state):
    state["model"].half()


def another_tensor(state):
    state["items"][0] = torch.full((2,), 3.0)


def another_shape(state):
    state["items"][0] = torch.ones(9)


def set_elsewhere(state):
    state["items"][0].set_(torch.full((2,), 5.0))


def other_strides(state):
    state["array"] = np.asfortranarray(state["array"])


def a_key_more(state):
    state["plain"]["more"] = 1
    state["items"][1]["more"] = torch.ones(1)


def a_key_less(state):
    state["items"][1].clear()


def another_order(state):
    state["tied"] = dict(reversed(state["tied"].items()))


def tie(state):
    state["tied"]["b"] = state["tied"]["a"]


def untie(state):
    state["tied"]["b"] = state["tied"]["a"].clone()


def a_step(state):
    step(state["model"], state["optimizer"])


def no_optimizer_state(state):
    state["optimizer"].state.clear()


def one_parameter_without_state(state):
    state["optimizer"].state.pop(state["model"][0].weight, None)


def an_empty_state(state):
    state["optimizer"].state[state["model"][0].weight] = {}


def a_frozen_group(state):
    state["optimizer"].add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5})


def another_model(state):
    state.update({key: value for key, value in make().items() if key in ("model", "optimizer")})


def plain_becomes_tensor(state):
    state["plain"]["epoch"] = torch.tensor(3)


def tensor_becomes_plain(state):
    state["items"][0] = 3


def another_shard(state):
    state["sharded"] = ce.ShardedArray(torch.arange(4.0), (4,), (0,))


def a_larger_shard(state):
    state["sharded"] = ce.ShardedArray(torch.arange(6.0), (6,), (0,))


def new_values(state):
    state["plain"]["epoch"] += 1
    state["own"].value["seed"] += 1
    state["optimizer"].param_groups[0]["lr"] *= 0.5


def fresh_state_dict(state):
    state["fresh"] = dict(state["model"].state_dict())


def nothing(state):
    pass


# fmt: off
CHANGES = (
    nothing, transpose, new_memory, other_dtype, another_tensor, another_shape, set_elsewhere, other_strides,
    a_key_more,
    a_key_less, another_order, tie, untie, a_step, no_optimizer_state, one_parameter_without_state, an_empty_state,
    a_frozen_group,
    another_model, plain_becomes_tensor, tensor_becomes_plain, another_shard, a_larger_shard, new_values,
    fresh_state_dict,
)
# fmt: on


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_of_the_state_is_seen_as_by_a_fresh_walk(change):
    state, reader = make(), StateReader()
    first = reader.read(state)
    known = arrays_of(first.leaves)
    change(state)
    second = reader.read(state)
    mine, fresh = seen(second, known), expected(state)
    # Objects that give new tensors each time lie somewhere else in each walk.
    for arrays in (mine[-1], fresh[-1]):
        arrays.pop(("average", "w"))
    assert mine == fresh
    assert [leaf.path for leaf in second.leaves] == [leaf.path for leaf in flatten(state).arrays]
    assert (second.structure is first.structure) == (second.structure == first.structure)


@pytest.mark.parametrize("seed", range(4))
def test_a_state_that_changes_in_any_way_between_saves_comes_back_as_it_was(tmp_path, seed):
    chance, state = random.Random(seed), make()
    for number in range(8):
        for change in chance.sample(CHANGES, chance.randrange(3)):
            try:
                change(state)
            except (AttributeError, KeyError, RuntimeError, TypeError):
                continue  # what an earlier change has made impossible, such as a step in half precision on some CPUs
        ce.save(tmp_path / "point", state)
        stored = ce.load(tmp_path / "point", rank=0)
        fresh = flatten(state)
        for leaf in fresh.arrays:
            value = stored
            for key in leaf.path:
                value = value[key]
            found = np.ascontiguousarray(value)
            (part,) = leaf.parts
            owner = part.memory.owner
            now = np.ascontiguousarray(owner.detach().numpy() if isinstance(owner, torch.Tensor) else owner)
            assert found.tobytes() == now.tobytes(), (number, leaf.path)


def test_an_unchanged_state_is_not_walked_again():
    state, reader = make(), StateReader()
    del state["average"]
    reader.read(state)
    again = reader.read(state)
    assert again.moved == {}


def test_tensors_that_are_new_objects_on_the_same_memory_are_no_change_of_structure():
    model = torch.nn.Linear(5, 5)
    reader = StateReader()
    first = reader.read({"model": model.state_dict()})
    second = reader.read({"model": model.state_dict()})
    assert second.structure is first.structure
    assert second.moved is not None


def test_between_saves_no_tensor_is_kept_alive(tmp_path):
    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 500)).sum().backward()
    optimizer.step()
    array = np.ones(1000)
    ce.save(tmp_path / "point", {"model": model, "optimizer": optimizer, "array": array})
    ce.save(tmp_path / "point", {"model": model, "optimizer": optimizer, "array": array})
    gone = [weakref.ref(thing) for thing in (model, model.weight, optimizer, array)]
    del model, optimizer, array
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
