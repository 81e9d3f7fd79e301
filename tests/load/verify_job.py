"""One of two ranks that train a sharded model: on rank 1 alone a load goes wrong in several ways.

`verify_job.py FOLDER` writes to `FOLDER/rank-N.json` which error each case has raised: its class and its words.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from holders import Changing, Holder
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptengine as ce
from ckptengine.torch.adapter import TorchAdapter

TIMEOUT = 60.0
FOLDER = Path(sys.argv[1])
RANK = -1
Change = Callable[[dict[str, Any]], dict[str, Any]]


class Momenta(torch.optim.SGD):
    """Keeps tensors in a list of each parameter's state, as well as the usual one."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["past"] = [parameter.detach() * 2]


class Metric(Holder):
    """Its `state_dict` holds a collective: a rank that asked once more or less than the others would hang them."""

    def state_dict(self) -> dict[str, Any]:
        total = torch.ones(1)
        dist.all_reduce(total)
        return {**self.state, "ranks": int(total)}


def state(steps: int, change: Change) -> dict[str, Any]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 7))
    for layer in model:
        fully_shard(layer)
    optimizer = Momenta(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "metric": Metric(n=steps), "held": Changing(change, n=1)}


def unchanged(held: dict[str, Any]) -> dict[str, Any]:
    return held


def on_rank_1(action: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Return a fresh state in which rank 1's object acts on the state when it is loaded."""

    def change(held: dict[str, Any]) -> dict[str, Any]:
        if RANK == 1:
            action(fresh)
        return held

    fresh = state(0, change)
    return fresh


def local(here: dict[str, Any]) -> torch.Tensor:
    weight = here["model"][0].weight
    assert isinstance(weight, DTensor)
    return weight._local_tensor.detach()


def write_past_the_counter(here: dict[str, Any]) -> None:
    local(here).numpy()[:] = 5


def take_other_memory(here: dict[str, Any]) -> None:
    here["model"][0].weight._local_tensor = torch.zeros_like(local(here))


def write_to_a_moment(here: dict[str, Any]) -> None:
    here["optimizer"].state[here["model"][1].bias]["momentum_buffer"]._local_tensor.add_(1)


def forget_nested_state(here: dict[str, Any]) -> None:
    here["optimizer"].state[here["model"][1].weight]["past"].clear()


def raise_when_asked_again(here: dict[str, Any]) -> None:
    def ask() -> dict[str, Any]:
        raise RuntimeError("no answer")

    here["held"].state_dict = ask


def whole_copies() -> None:
    """On rank 1, an optimizer's state is made whole instead of like its parameter."""
    if RANK != 1:
        ce.load(FOLDER / "point", into=state(0, unchanged), timeout=TIMEOUT)
        return
    make, check = TorchAdapter.new_state_tensor, TorchAdapter.check_parameter_state

    def whole(self: TorchAdapter, group: Any, parameter: Any, key: str, dtype: str, shape: Any, *more: Any) -> Any:
        return torch.empty(shape)

    TorchAdapter.new_state_tensor = whole  # type: ignore[method-assign]
    TorchAdapter.check_parameter_state = lambda *given: None  # type: ignore[method-assign]
    try:
        ce.load(FOLDER / "point", into=state(0, unchanged), timeout=TIMEOUT)
    finally:
        TorchAdapter.new_state_tensor, TorchAdapter.check_parameter_state = make, check  # type: ignore[method-assign]


def load_with(action: Callable[[dict[str, Any]], Any]) -> None:
    ce.load(FOLDER / "point", into=on_rank_1(action), timeout=TIMEOUT)


def of_its_own(change: Change, steps: int) -> dict[str, Any]:
    """A state of which each rank has a part in a structure of its own."""
    kept: tuple[dict[str, Any], ...] = (
        {"window": torch.full((2,), float(steps)), "n": steps},
        {"list": [torch.full((3, 2), float(steps)), steps], "deep": {"x": torch.full((1,), float(steps))}},
    )
    return {"shared": torch.ones(2), "own": ce.PerRank(Changing(change, **(kept[RANK] if steps else {})))}


def load_own(change: Change) -> None:
    """Load into objects that have nothing yet; on rank 1 something becomes of what one is handed."""
    ce.save(FOLDER / "own", of_its_own(unchanged, 2), timeout=TIMEOUT)
    fresh = of_its_own(change if RANK == 1 else unchanged, 0)
    ce.load(FOLDER / "own", into=fresh, timeout=TIMEOUT)
    here, saved = fresh["own"].value.state, of_its_own(unchanged, 2)["own"].value.state
    assert list(here) == list(saved)
    assert repr(here) == repr(saved)


def with_other_bytes(held: dict[str, Any]) -> dict[str, Any]:
    return {**held, "list": [held["list"][0] + 1, held["list"][1]]}


OWN: dict[str, Change] = {
    "own_is_right": unchanged,
    "own_bytes": with_other_bytes,
    "own_value": lambda held: {**held, "list": [held["list"][0], 3]},
    "own_leaf_is_gone": lambda held: {**held, "deep": {}},
    "own_leaf_too_many": lambda held: {**held, "more": torch.ones(1)},
    "own_container": lambda held: {**held, "list": tuple(held["list"])},
    "own_order": lambda held: dict(reversed(held.items())),
    "own_is_the_other_ranks": lambda held: {"window": torch.full((2,), 2.0), "n": 2},
}
ACTIONS = (write_past_the_counter, take_other_memory, write_to_a_moment, forget_nested_state, raise_when_asked_again)
CASES: dict[str, Callable[[], object]] = {
    **{action.__name__: functools.partial(load_with, action) for action in ACTIONS},
    **{name: functools.partial(load_own, change) for name, change in OWN.items()},
    "whole_copies": whole_copies,
    "nothing_wrong": functools.partial(load_with, lambda here: None),
}


def main() -> None:
    global RANK
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    RANK = dist.get_rank()
    ce.save(FOLDER / "point", state(2, unchanged), timeout=TIMEOUT)
    found = {}
    for name, case in CASES.items():
        try:
            case()
            found[name] = ["", ""]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
