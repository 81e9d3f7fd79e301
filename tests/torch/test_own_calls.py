"""Optimizers that say of themselves what they need, or do more than to set it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_memory import load, save
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.state.tree import flatten


class Averager:
    """Has a step that lies in no optimizer, as torch's model averagers have; adds it, so that a lost one shows."""

    def __init__(self) -> None:
        self.step = 0

    def average_parameters(self, params: Any) -> None:
        self.step += 1
        with torch.no_grad():
            for group in params:
                for parameter in group["params"]:
                    parameter.add_(self.step * 1e-3)


class Lookahead(Optimizer):
    """As timm's: shares the groups of what it wraps, and saves that one's state, not its own."""

    def __init__(self, base: Optimizer) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group.setdefault("slow_step", 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        for group in self.base.param_groups:
            group["slow_step"] += 1
            for p in group["params"]:
                slow = self.base.state[p].setdefault("slow", p.clone())
                if group["slow_step"] % 2 == 0:
                    p.copy_(slow.add_(p - slow, alpha=0.5))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)
        self.param_groups = self.base.param_groups


class Nested(Lookahead):
    """As pytorch_optimizer's: its own form of state around that of what it wraps."""

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "kind": "nested"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["kind"] == "nested"
        super().load_state_dict(state["base"])


class Container(Optimizer):
    """Several optimizers as one; it has neither groups nor state."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {f"part{number}": optimizer.state_dict() for number, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[f"part{number}"])


class Masters(Optimizer):
    """Keeps weights of more precision beside the model's."""

    def __init__(self, model: nn.Module) -> None:
        self.low = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().double() + 1e-12) for p in self.low]
        self.inner = AdamW(self.masters, lr=0.1)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for master, low in zip(self.masters, self.low, strict=True):
            master.grad = low.grad.double()
        self.inner.step()
        for master, low in zip(self.masters, self.low, strict=True):
            low.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for low in self.low:
            low.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "masters": [master.detach().clone() for master in self.masters]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
        self.state, self.param_groups = self.inner.state, self.inner.param_groups
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)


class Warm(AdamW):
    """Keeps a counter of its own, and a schedule's state, beside torch's."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "warm": {"count": self.count, "curve": torch.arange(self.count)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count = state["warm"]["count"]
        assert len(state["warm"]["curve"]) == self.count


class Hooked(SGD):
    """A plain optimizer with hooks, as a library may add them to anybody's."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.offset = 0.0
        self.register_state_dict_post_hook(lambda optimizer, state: {**state, "offset": optimizer.offset})
        self.register_load_state_dict_pre_hook(self._take)

    @staticmethod
    def _take(optimizer: Any, state: dict[str, Any]) -> None:
        optimizer.offset = state.pop("offset")

    def step(self, closure: Any = None) -> None:
        super().step()
        self.offset += 0.01
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(self.offset)


class Text(Adam):
    """State for no parameter, under a string, as some wrappers keep it."""

    def step(self, closure: Any = None) -> Any:
        self.total = getattr(self, "total", torch.zeros(())) + 1
        for group in self.param_groups:
            group["lr"] = 0.1 / float(self.total)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        own = super().state_dict()
        own["state"] = {**own["state"], "tuner": {"total": getattr(self, "total", torch.zeros(())).clone()}}
        return own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        tuner = state["state"].get("tuner")
        super().load_state_dict({**state, "state": {k: v for k, v in state["state"].items() if k != "tuner"}})
        self.total = tuner["total"]


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "post local SGD": lambda m: PostLocalSGDOptimizer(SGD(m.parameters(), lr=0.1, momentum=0.9), Averager()),
    "shares groups with what it wraps": lambda m: Lookahead(AdamW(m.parameters(), lr=0.1, amsgrad=True)),
    "a form of its own": lambda m: Nested(Adam(m.parameters(), lr=0.1)),
    "a container": lambda m: Container(Adam(m[0].parameters(), lr=0.1), SGD(m[2].parameters(), lr=0.1, momentum=0.5)),
    "master weights": Masters,
    "a counter beside the state": lambda m: Warm(m.parameters()),
    "hooks": lambda m: Hooked(m.parameters(), lr=0.1, momentum=0.9),
    "state under a string": lambda m: Text(m.parameters(), lr=0.1),
}


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        net(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("used", [False, True], ids=["into a fresh one", "into one that has trained"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_with_calls_of_its_own_goes_on_bit_for_bit(name: str, used: bool) -> None:
    net = model()
    optimizer = MAKERS[name](net)
    train(net, optimizer, range(3))
    stored = save({"model": net, "optimizer": optimizer})
    train(net, optimizer, range(3, 6))
    other = model()
    fresh = MAKERS[name](other)
    if used:
        train(other, fresh, range(10, 12))
    load(stored, {"model": other, "optimizer": fresh})
    train(other, fresh, range(3, 6))
    assert all(map(torch.equal, weights(net), weights(other)))


def test_a_wrappers_state_has_the_parameters_names() -> None:
    net = model()
    optimizer = Warm(net.parameters())
    train(net, optimizer, range(2))
    flat = flatten({"model": net, "optimizer": optimizer})
    paths = {leaf.path for leaf in flat.arrays}
    assert ("optimizer", "state", "model.2.weight", "exp_avg") in paths
    assert ("optimizer", "warm", "curve") in paths
    assert flat.values["optimizer", "param_groups"][0]["params"] == [
        f"model.{name}" for name, _ in net.named_parameters()
    ]


def test_a_schedule_on_a_wrapper_still_reaches_what_it_wraps() -> None:
    net = model()
    optimizer = PostLocalSGDOptimizer(SGD(net.parameters(), lr=0.1, momentum=0.9), Averager())
    train(net, optimizer, range(2))
    stored = save({"model": net, "optimizer": optimizer})
    schedule = StepLR(optimizer, 1, gamma=0.5)
    load(stored, {"model": net, "optimizer": optimizer})
    optimizer.step()
    schedule.step()
    assert optimizer.optim.param_groups[0]["lr"] == 0.05
    assert optimizer.optim.param_groups is optimizer.param_groups


class Caching(Adam):
    """`load_state_dict` alone is its own: it makes anew what it has computed from its state."""

    loads = 0
    cache = 0.0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.loads += 1
        self.cache = sum(float(item["exp_avg"].sum()) for item in self.state.values())


def test_a_load_state_dict_of_its_own_runs_once_after_the_fill_and_casts_nothing() -> None:
    net = model().to(torch.bfloat16)
    optimizer = Caching(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn(parameter.shape),  # of more precision than the parameter
            "exp_avg_sq": torch.rand(parameter.shape),
        }
    stored = save({"model": net, "optimizer": optimizer})
    other = model().to(torch.bfloat16)
    fresh = Caching(other.parameters(), lr=0.1)
    load(stored, {"model": other, "optimizer": fresh})
    assert fresh.loads == 1
    assert fresh.cache == pytest.approx(sum(float(s["exp_avg"].sum()) for s in optimizer.state.values()), rel=1e-2)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert fresh.state[mine][key].dtype == value.dtype
            assert torch.equal(fresh.state[mine][key], value)


def test_what_a_plain_optimizer_would_not_take_is_no_success() -> None:
    net = model()
    stored = save({"model": net, "optimizer": Warm(net.parameters())})
    with pytest.raises(LoadMismatchError, match=r"optimizer: .*Warm in the checkpoint, .*AdamW here"):
        load(stored, {"model": net, "optimizer": AdamW(net.parameters())})


def test_an_optimizer_that_refuses_what_was_saved_is_named() -> None:
    net = model()
    stored = save({"model": net, "optimizer": Container(Adam(net.parameters()))})
    with pytest.raises(
        LoadMismatchError, match=r"optimizer: load_state_dict of .*Container refused .*ValueError: .*size"
    ):
        load(stored, {"model": net, "optimizer": Container(Adam(net[0].parameters()), Adam(net[2].parameters()))})


def test_an_error_in_an_optimizers_state_dict_names_its_path() -> None:
    class Broken(Warm):
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("warm")

    with pytest.raises(StateError, match=r"optimizer: state_dict\(\) of .*Broken raised KeyError: 'warm'"):
        flatten({"optimizer": Broken(model().parameters())})


def test_state_without_tensors_and_the_order_of_its_keys_come_back() -> None:
    def made() -> tuple[nn.Module, SGD]:
        net = model()
        return net, SGD(net.parameters(), lr=0.1)

    net, optimizer = made()
    optimizer.state["k"] = torch.tensor([3])  # type: ignore[index]
    first, second, *_ = net.parameters()
    optimizer.state[second] = {"calls": 2}
    optimizer.state[first] = {}
    fresh_net, fresh = made()
    fresh.state["k"] = torch.tensor([0])  # type: ignore[index]
    load(save({"model": net, "optimizer": optimizer}), {"model": fresh_net, "optimizer": fresh})
    state = fresh.state_dict()["state"]
    assert list(state) == list(optimizer.state_dict()["state"]) == ["k", 1, 0]
    assert (state[1], state[0]) == ({"calls": 2}, {})
