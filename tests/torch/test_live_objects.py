"""Objects that lie in what another object gives as its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from state_memory import load, save
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from ckptengine.errors import LoadMismatchError


class WarmUp(LRScheduler):
    """As many that are in use: the inherited `state_dict` gives all attributes, the next scheduler among them."""

    def __init__(self, optimizer: Any, after: LRScheduler | None, steps: int = 2) -> None:
        self.after, self.steps = after, steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        if self.last_epoch >= self.steps and self.after is not None:
            return self.after.get_last_lr()
        return [base * (self.last_epoch + 1) / self.steps for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch + 1 > self.steps and self.after is not None:
            self.last_epoch += 1
            self.after.step()
        else:
            super().step()


class Holder:
    """Holds whatever it is given, in lists and dicts."""

    def __init__(self, *held: Any, deep: bool = False) -> None:
        self.held, self.deep = {"list": [1, *held]}, deep

    def state_dict(self) -> dict[str, Any]:
        return self.held

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = copy.deepcopy(state) if self.deep else state


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count, self.sums = count, torch.full((3,), float(count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.sums = state["count"], state["sums"]


def schedule(after: bool = True) -> tuple[torch.optim.Optimizer, WarmUp]:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    return optimizer, WarmUp(optimizer, CosineAnnealingLR(optimizer, 10) if after else None)


def rates(optimizer: torch.optim.Optimizer, scheduler: WarmUp, steps: int) -> list[float]:
    result = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        result.append(optimizer.param_groups[0]["lr"])
    return result


@pytest.mark.parametrize("steps", [1, 5])
def test_a_scheduler_inside_a_scheduler_stays_itself_and_goes_on(steps: int) -> None:
    optimizer, scheduler = schedule()
    rates(optimizer, scheduler, steps)
    stored = save({"optimizer": optimizer, "scheduler": scheduler})
    expected = rates(optimizer, scheduler, 4)
    other, fresh = schedule()
    inner = fresh.after
    load(stored, {"optimizer": other, "scheduler": fresh})
    assert fresh.after is inner
    assert inner.optimizer is other
    assert rates(other, fresh, 4) == expected


@pytest.mark.parametrize("deep", [False, True], ids=["kept", "copied"])
def test_objects_modules_and_optimizers_in_an_objects_state_are_loaded_where_they_are(deep: bool) -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    stored = save({"holder": Holder(Counter(7), net, optimizer)})
    other = nn.Linear(2, 2)
    counter, module, adam = Counter(), other, torch.optim.Adam(other.parameters())
    holder = Holder(counter, module, adam, deep=deep)
    load(stored, {"holder": holder})
    assert counter.count == 7
    assert counter.sums.tolist() == [7.0] * 3
    assert torch.equal(module.weight, net.weight)
    assert torch.equal(adam.state[module.weight]["exp_avg"], optimizer.state[net.weight]["exp_avg"])
    kept = holder.held["list"][1]
    assert type(kept) is Counter
    assert kept.count == 7
    assert deep or holder.held["list"] == [1, counter, module, adam]


def test_nothing_takes_the_place_of_an_object_that_is_not_there_yet() -> None:
    _, scheduler = schedule()
    stored = save({"scheduler": scheduler})
    _, empty = schedule(after=False)
    with pytest.raises(
        LoadMismatchError, match=r"scheduler\.after: NoneType here, .*CosineAnnealingLR in the checkpoint"
    ):
        load(stored, {"scheduler": empty})
    assert empty.after is None


def test_an_object_of_which_the_checkpoint_has_nothing_is_told() -> None:
    _, empty = schedule(after=False)
    stored = save({"scheduler": empty, "holder": Holder()})
    _, scheduler = schedule()
    with pytest.raises(LoadMismatchError, match=r"scheduler\.after: .*CosineAnnealingLR here"):
        load(stored, {"scheduler": scheduler, "holder": Holder()})
