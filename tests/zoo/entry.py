"""What an entry of the zoo is, and the tiny training that most of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["BATCH", "Entry", "Job", "World", "loss_of", "matrices", "mixed", "train", "wide"]

BATCH = 4


@dataclass(frozen=True)
class World:
    """The process that an entry runs in: which rank of how many, and from which seed its weights are made."""

    rank: int = 0
    size: int = 1
    seed: int = 0
    sharded: bool = True

    def shard(self, model: nn.Module) -> nn.Module:
        """Return the model, sharded by `fully_shard` layer by layer where there is more than one rank."""
        if self.size > 1 and self.sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in model.children():
                if any(True for _ in layer.parameters()):
                    fully_shard(layer)
            fully_shard(model)
        return model

    def batch(self, step: int, *shape: int) -> torch.Tensor:
        """Return this rank's input of a step; it comes from no stream of the process."""
        generator = torch.Generator().manual_seed(1000 * step + self.rank)
        return torch.randn(BATCH, *shape, generator=generator)


@dataclass
class Job:
    """One training: what is given to the engine, what a step does, and what else is compared."""

    state: dict[str, Any]
    step: Callable[[int], float]
    watched: dict[str, Any] = field(default_factory=dict)
    """Further objects to compare, such as the parts of a wrapper."""
    generators: dict[str, Any] = field(default_factory=dict)
    """What is given to `ce.RNG`."""


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    package: str
    name: str
    start: Callable[[World], Job]
    alone: str = ""
    """Why it is not run on two ranks; empty where it is."""
    own_buffers: bool = False
    """Whether ranks have differing buffers. Those of rank 0 come back, as from torch's own checkpoints, so all
    trainings are given these in the middle."""


def mixed(world: World, outputs: int = 3) -> nn.Module:
    """Return a model with parameters of one, two and four dimensions, sharded where there are ranks.

    With three outputs the ranks' parts of the last layer have different lengths.
    """
    torch.manual_seed(world.seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Linear(8, outputs),
    )
    return world.shard(model)


def matrices(world: World) -> nn.Module:
    """Return a model with matrices only, for what takes nothing else."""
    torch.manual_seed(world.seed)
    return world.shard(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    )


def wide(world: World) -> nn.Module:
    """Return a model one layer of which has 4096 elements on each of two ranks."""
    torch.manual_seed(world.seed)
    return world.shard(nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 128), nn.Linear(128, 3)))


def loss_of(world: World, model: Callable[[torch.Tensor], torch.Tensor], step: int) -> torch.Tensor:
    return (model(world.batch(step, 1, 4, 4)) - 0.5).square().mean()


def train(
    world: World,
    model: nn.Module,
    optimizer: Any,
    *,
    how: str = "plain",
    more: Mapping[str, Any] | None = None,
    after: Iterable[Callable[[int, torch.Tensor], object]] = (),
) -> Job:
    """Return the job that trains a model with an optimizer.

    `how` is `plain` (backward, then step), `closure` (the step calls forward and backward), `again` (backward, then a
    step that calls them again), `value` (backward, then a step that asks for the loss) or `graph` (backward leaves a
    graph for second derivatives). `more` is added to the state, `after` is called after each step.
    """

    def step(number: int) -> float:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(world, model, number)
            loss.backward(create_graph=how == "graph")
            return loss

        loss = optimizer.step(closure) if how == "closure" else closure()
        if how == "again":
            optimizer.step(closure)
        elif how == "value":
            optimizer.step(lambda: float(loss.detach()))
        elif how != "closure":
            optimizer.step()
        for call in after:
            call(number, loss)
        return float(loss.detach())

    return Job({"model": model, "optimizer": optimizer, **(more or {})}, step)
