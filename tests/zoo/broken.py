"""Entries that are known to be at fault, to show that the zoo says so."""

from __future__ import annotations

from typing import Any

import torch
from entry import Entry, Job, World, mixed, train

__all__ = ["catalogue"]


class HidesItsCounter(torch.optim.SGD):
    """Its steps become smaller with a counter that its `state_dict` does not have."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.calls
        return super().step(closure)


class HidesNothing(HidesItsCounter):
    """The same, written as it should be."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.calls = state.pop("calls")
        super().load_state_dict(state)


class ChangedByBeingSaved:
    """An object that counts how often it is asked for its state."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, int]:
        self.asked += 1
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


class CannotBeRestored(ChangedByBeingSaved):
    """An object that refuses what it gave."""

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise ValueError("never")


def catalogue() -> list[Entry]:
    """Return one entry for each way to be at fault, and one that is not."""
    return [
        Entry("broken", "HidesItsCounter", lambda world: _optimized(world, HidesItsCounter)),
        Entry("broken", "HidesNothing", lambda world: _optimized(world, HidesNothing)),
        Entry("broken", "ChangedByBeingSaved", lambda world: _beside(world, ChangedByBeingSaved())),
        Entry("broken", "CannotBeRestored", lambda world: _beside(world, CannotBeRestored())),
        Entry("broken", "EndsItsProcess", lambda world: Job({}, lambda _: exit_at_once())),
    ]


def _optimized(world: World, kind: type[torch.optim.SGD]) -> Job:
    model = mixed(world)
    return train(world, model, kind(model.parameters(), lr=0.1, momentum=0.9))


def _beside(world: World, thing: Any) -> Job:
    model = mixed(world)
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.1), more={"thing": thing})


def exit_at_once() -> float:
    import os

    os._exit(3)
