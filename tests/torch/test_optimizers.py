from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_memory import Stored, load, save
from torch import nn

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, RestoreDifferenceError, StateError
from ckptengine.state.outline import Outline
from ckptengine.state.rng import RNG
from ckptengine.state.tree import flatten

Make = Callable[[Any], torch.optim.Optimizer]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


OPTIMIZERS: list[Make] = [
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
    lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.01),
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    lambda p: torch.optim.Adagrad(p, lr=0.01),
    lambda p: torch.optim.Adafactor(p, lr=0.01),
    lambda p: torch.optim.NAdam(p, lr=0.01),
    lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
]
NAMES = ["adamw", "amsgrad", "fused", "sgd", "momentum", "rmsprop", "adagrad", "adafactor", "nadam", "lbfgs"]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=NAMES)
def test_training_goes_on_bit_for_bit_in_a_fresh_optimizer(make: Make) -> None:
    net, fresh = model(), model()
    optimizer, restored = make(net.parameters()), make(fresh.parameters())
    for seed in range(3):
        step(net, optimizer, seed)
    assert load(save({"model": net, "opt": optimizer}), {"model": fresh, "opt": restored}).complete
    assert same(optimizer.state_dict(), restored.state_dict())
    for seed in range(3, 5):
        step(net, optimizer, seed)
        step(fresh, restored, seed)
    assert same(net.state_dict(), fresh.state_dict())
    assert same(optimizer.state_dict(), restored.state_dict())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("make", OPTIMIZERS, ids=NAMES)
def test_saving_changes_nothing(make: Make, steps: int) -> None:
    net = model()
    optimizer = make(net.parameters())
    for seed in range(steps):
        step(net, optimizer, seed)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    keys = [id(key) for key in optimizer.state]
    gradients = [p.grad is None for p in net.parameters()]
    flatten({"opt": optimizer, "model": net})
    assert same(before, (net.state_dict(), optimizer.state_dict()))
    assert keys == [id(key) for key in optimizer.state]
    assert gradients == [p.grad is None for p in net.parameters()]


def test_state_has_the_parameters_names_and_a_fresh_optimizer_none() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    fresh = flatten({"opt": optimizer, "deep": {"net": net}})
    assert {leaf.path[0] for leaf in fresh.arrays} == {"deep"}
    (groups,) = fresh.values.values()
    assert groups[0]["params"] == [
        "deep.net.0.weight",
        "deep.net.0.bias",
        "deep.net.2.weight",
        "deep.net.2.bias",
    ]
    step(net, optimizer)
    flat = flatten({"opt": optimizer, "deep": {"net": net}})
    paths = {leaf.path for leaf in flat.arrays}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert ("opt", "state", "deep.net.2.bias", key) in paths
    alone = {leaf.path[2] for leaf in flatten({"opt": optimizer}).arrays}
    assert alone == {"0.0", "0.1", "0.2", "0.3"}


def test_optimizer_and_model_may_lie_in_lists_and_be_saved_apart() -> None:
    net, fresh = model(), model()
    optimizer, restored = torch.optim.AdamW(net.parameters()), torch.optim.AdamW(fresh.parameters())
    step(net, optimizer)
    assert load(save({"opts": [optimizer]}), {"opts": [restored]}).complete
    assert same(optimizer.state_dict(), restored.state_dict())


def stored_after(steps: int, **options: Any) -> tuple[Stored, nn.Module, torch.optim.Optimizer]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), **options)
    for seed in range(steps):
        step(net, optimizer, seed)
    return save({"model": net, "opt": optimizer}), net, optimizer


def test_state_that_was_not_saved_is_removed() -> None:
    stored, _, _ = stored_after(0)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    step(net, optimizer)
    binding_target = {"model": net, "opt": optimizer}
    assert load(stored, binding_target).complete
    assert not optimizer.state


def with_empty_states(*empty: int) -> dict[str, Any]:
    """A plain optimizer and one that calls its own code, with empty state for some of the parameters."""

    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)

    net = model()
    parameters = list(net.parameters())
    made = {"model": net, "plain": torch.optim.SGD(parameters), "own": Own(parameters)}
    for name in ("plain", "own"):
        made[name].state.update({parameters[number]: {} for number in empty})
        made[name].state[parameters[1]] = {"seen": torch.arange(3)}
    return made


@pytest.mark.parametrize("there", [(), (0, 2, 3)], ids=["fresh", "with others"])
def test_an_empty_state_of_a_parameter_comes_back_and_no_state_comes_back_as_none(
    there: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    saved, target = with_empty_states(3, 0), with_empty_states(*there)
    ce.save(tmp_path / "point", saved)
    ce.load(tmp_path / "point", into=target)
    for name in ("plain", "own"):
        assert same(target[name].state_dict(), saved[name].state_dict())
        assert set(target[name].state_dict()["state"]) == {0, 1, 3}
    state = ce.load(tmp_path / "point")["plain"]["state"]
    assert list(state) == ["model.0.weight", "model.0.bias", "model.2.bias"]
    assert state["model.2.bias"] == {}
    assert "model.2.weight" not in state
    # Only that was asked for is touched.
    fresh = with_empty_states()
    ce.load(tmp_path / "point", into=fresh, only=["plain.state.model.0.weight"])
    assert set(fresh["plain"].state_dict()["state"]) == {0, 1}


def test_an_empty_state_that_is_lost_in_a_load_is_found(tmp_path: pathlib.Path) -> None:
    class Losing(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.state.clear()

    net = model()
    optimizer = Losing(net.parameters())
    optimizer.state[net[0].weight] = {}
    ce.save(tmp_path / "point", {"model": net, "optimizer": optimizer})
    with pytest.raises(RestoreDifferenceError, match=r"optimizer\.state\.model\.0\.weight: an empty state"):
        ce.load(tmp_path / "point", into={"model": net, "optimizer": optimizer})


def test_a_checkpoint_that_does_not_tell_empty_states_leaves_them(tmp_path: pathlib.Path) -> None:
    stored = save(with_empty_states())
    outline = dataclasses.replace(stored.saved.outline or Outline(), empty=None)
    older = dataclasses.replace(stored, saved=dataclasses.replace(stored.saved, outline=outline))
    target = with_empty_states(2)
    assert load(older, target).complete
    assert set(target["plain"].state_dict()["state"]) == {1, 2}
    assert load(stored, target).complete
    assert set(target["plain"].state_dict()["state"]) == {1}


def test_state_that_is_there_is_filled_in_place() -> None:
    stored, _, saved = stored_after(3)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    step(net, optimizer, 9)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    assert load(stored, {"model": net, "opt": optimizer}).complete
    assert all(a is b for a, b in zip(tensors, (t for s in optimizer.state.values() for t in s.values()), strict=True))
    assert same(saved.state_dict(), optimizer.state_dict())


def test_groups_keep_their_parameters_and_get_their_values() -> None:
    def build(lr: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        net = model()
        groups = [
            {"params": net[0].parameters(), "lr": lr},
            {"params": net[2].parameters(), "weight_decay": 0.5},
        ]
        return net, torch.optim.AdamW(groups, lr=0.2)

    net, optimizer = build(0.125)
    step(net, optimizer)
    stored = save({"model": net, "opt": optimizer})
    fresh, restored = build(0.75)
    group = restored.param_groups[0]
    assert load(stored, {"model": fresh, "opt": restored}).complete
    assert restored.param_groups[0] is group
    assert (group["lr"], restored.param_groups[1]["weight_decay"]) == (0.125, 0.5)
    assert group["params"] == list(fresh[0].parameters())
    tensor_lr = torch.tensor(0.75)
    fresh, restored = build(tensor_lr)
    load(stored, {"model": fresh, "opt": restored})
    assert restored.param_groups[0]["lr"] is tensor_lr
    assert tensor_lr.item() == 0.125


def test_groups_that_differ_are_explained() -> None:
    stored, _, _ = stored_after(1)
    net = model()
    fewer = torch.optim.AdamW(net[0].parameters())
    with pytest.raises(LoadMismatchError, match=r"group 0 has other parameters .*model\.2\.bias, model\.2\.weight"):
        load(stored, {"model": net, "opt": fewer})
    split = torch.optim.AdamW([{"params": net[0].parameters()}, {"params": net[2].parameters()}])
    with pytest.raises(LoadMismatchError, match="2 parameter groups here, 1 in the checkpoint"):
        load(stored, {"model": net, "opt": split})
    report = load(stored, {"model": net, "opt": split}, strict=False)
    assert len(report.mismatched) == 1
    assert len(split.state) == 4


def test_state_of_a_parameter_with_another_shape_is_not_taken() -> None:
    stored, _, _ = stored_after(1)
    for with_model in (True, False):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 7))
        optimizer = torch.optim.AdamW(net.parameters())
        state: dict[str, Any] = {"model": net, "opt": optimizer}
        options: dict[str, Any] = {} if with_model else {"only": ["opt"]}
        report = load(stored, state, strict=False, **options)
        reason = f"opt.state.model.2.weight: state of a parameter of shape {(7, 4)} here, {(2, 4)} in the checkpoint"
        assert reason in report.mismatched
        assert net[2].weight not in optimizer.state
        assert net[0].weight in optimizer.state
        step(net, optimizer)


def test_parts_of_an_optimizer_are_chosen_and_its_names_follow_rename() -> None:
    stored, source, saved = stored_after(2, lr=0.5)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.25)
    state = {"net": net, "opt": optimizer}
    report = load(stored, state, rename={"model": "net"}, only=["opt.state"])
    assert report.complete
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert same(saved.state_dict()["state"], optimizer.state_dict()["state"])
    report = load(stored, state, rename={"model": "net"})
    assert report.complete
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(net[0].weight, source[0].weight)
    with pytest.raises(LoadMismatchError, match=r"missing in the checkpoint:\n  other\n"):
        load(stored, {"model": model(), "other": optimizer}, only=["other.state"])


def test_schedulers_come_back_exactly() -> None:
    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
        first = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 3])
        second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [4])

    optimizer, scheduler = build()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    stored = save({"opt": optimizer, "sched": scheduler})
    restored, again = build()
    assert load(stored, {"opt": restored, "sched": again}).complete
    for _ in range(4):
        assert same(scheduler.state_dict(), again.state_dict())
        assert restored.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for o, s in ((optimizer, scheduler), (restored, again)):
            o.step()
            s.step()


class Counting(torch.optim.SGD):
    """Keeps state of its own under names, as some published optimizers do."""

    def step(self, closure: Any = None) -> None:
        super().step()
        count = self.state.setdefault("shared", {"count": 0})["count"] + 1
        self.state["shared"] = {"count": count, "mean": torch.full((3,), float(count))}
        self.state["steps"] = count


def test_state_under_names_of_its_own_comes_back_into_a_fresh_optimizer() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer, fresh = (Counting(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert load(save({"model": model, "optimizer": optimizer}), {"model": other, "optimizer": fresh}).complete
    assert fresh.state["steps"] == fresh.state["shared"]["count"] == 2
    assert fresh.state["shared"]["mean"].tolist() == [2, 2, 2]
    moments = [
        [s["momentum_buffer"] for s in o.state.values() if isinstance(s, dict) and "momentum_buffer" in s]
        for o in (optimizer, fresh)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    assert len(moments[1]) == 2


def test_state_for_no_parameter_is_refused() -> None:
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    optimizer.state[torch.nn.Parameter(torch.ones(2))] = {"x": 1}
    with pytest.raises(StateError, match=r"opt: .*none of its groups"):
        flatten({"opt": optimizer})


def test_a_function_among_the_hyperparameters_is_refused_by_path() -> None:
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    optimizer.param_groups[0]["scale"] = abs
    with pytest.raises(StateError, match=r"opt\.param_groups\.0\.scale"):
        save({"opt": optimizer})


class Factored(torch.optim.Optimizer):
    """Keeps what has another shape than the parameter under the names that Adam has: rows, blocks, a projection."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("exp_avg_sq", torch.zeros(3, p.numel() // p.shape[-1])).add_(p.grad.sum())
                self.state[p].setdefault("exp_avg", torch.zeros(p.numel() * 2)).add_(1)
                p.sub_(self.state[p]["exp_avg_sq"].mean())


@pytest.mark.parametrize("with_model", [True, False])
def test_state_of_any_shape_is_restored_to_a_parameter_of_the_same_shape_and_no_other(with_model: bool) -> None:
    def made(width: int) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, width))
        state: dict[str, Any] = {"opt": Factored(net.parameters(), {})}
        return net, {"model": net, **state} if with_model else state

    net, state = made(2)
    net(torch.ones(1, 3)).sum().backward()
    state["opt"].step()
    stored = save(state)
    fresh, target = made(2)
    load(stored, target)
    for mine, theirs in zip(fresh.parameters(), net.parameters(), strict=True):
        for key, value in state["opt"].state[theirs].items():
            assert torch.equal(target["opt"].state[mine][key], value)
    other, target = made(5)
    report = load(stored, target, strict=False)
    reasons = [line for line in report.mismatched if "opt.state" in line]
    assert len(reasons) == 2
    assert all("state of a parameter of shape (5" in line for line in reasons)
    assert other[0].weight in target["opt"].state
    assert other[1].weight not in target["opt"].state


class Draws(torch.optim.SGD):
    """Its steps are random, by a generator of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.generator = torch.Generator().manual_seed(3)


def test_an_optimizer_with_a_generator_of_its_own_is_refused_until_the_streams_have_it() -> None:
    optimizer = Draws(model().parameters())
    with pytest.raises(StateError, match=r"opt: Draws draws from its own `generator`.*ce\.RNG"):
        flatten({"opt": optimizer})
    rng = RNG({"generator": optimizer.generator})
    flatten({"opt": optimizer, "rng": rng})


def test_a_group_key_that_is_newer_than_the_checkpoint_keeps_its_value(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    old = torch.optim.SGD([weight], lr=0.5)
    del old.param_groups[0]["maximize"]
    ce.save(tmp_path, {"w": weight, "o": old})
    new = torch.optim.SGD([weight], lr=0.1, maximize=True)
    ce.load(tmp_path, into={"w": weight, "o": new})
    assert (new.param_groups[0]["lr"], new.param_groups[0]["maximize"]) == (0.5, True)


def test_groups_that_share_one_rate_tensor_get_tensors_of_their_own_where_their_saved_rates_differ(tmp_path):
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    saved = torch.optim.Adam([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}])
    ce.save(tmp_path, {"a": a, "b": b, "o": saved})
    shared = torch.optim.Adam([{"params": [a]}, {"params": [b]}], lr=torch.tensor(0.5))
    ce.load(tmp_path, into={"a": a, "b": b, "o": shared})
    assert [round(float(group["lr"]), 6) for group in shared.param_groups] == [0.1, 0.2]
