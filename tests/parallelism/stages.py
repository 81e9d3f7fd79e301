"""Jobs whose ranks are threads of this process and have different states, as the stages of a pipeline do."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from thread_ranks import Ranks
from torch import nn

import ckptengine as ce
from ckptengine.comm.base import Communicator

LAYERS, WIDTH = 4, 4
State = dict[str, Any]

_one_at_a_time = threading.Lock()  # torch's hooks and streams are not for several threads


class StageJob:
    """One start of a job: ranks that each have a Checkpointer."""

    def __init__(self, run: Path, ranks: int, **options: Any) -> None:
        self.size, self._ranks = ranks, Ranks(ranks)
        self.operations = 0
        for comm in self._ranks.comms:
            comm.all_gather = functools.partial(self._count, comm.all_gather)
            comm.broadcast = functools.partial(self._count, comm.broadcast)
        self.checkpointers = self.each(
            lambda rank: ce.Checkpointer(run, comm=self._ranks.comms[rank], timeout=20, preemption=None, **options)
        )
        self._run, self._step = run, 0

    def _count(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.operations += 1
        return operation(*arguments, **options)

    def comm(self, rank: int) -> Communicator:
        return self._ranks.comms[rank]

    def each(self, call: Callable[[int], Any]) -> list[Any]:
        """Call with each rank, all at once."""
        return self._ranks.run(call)

    def save(self, states: Iterable[State]) -> None:
        """Save each rank's state, and wait until that is committed."""
        self._step += 1
        given = list(states)
        self.each(lambda rank: self.checkpointers[rank].save(self._step, given[rank]).durable.result(20))

    def load(self, states: Iterable[State], **options: Any) -> list[ce.LoadReport]:
        """Fill each rank's state with the newest checkpoint."""
        given = list(states)
        return self.each(
            lambda rank: ce.load(self._run, into=given[rank], comm=self._ranks.comms[rank], timeout=20, **options)
        )

    def restore(self, states: Iterable[State], **options: Any) -> list[int | None]:
        given = list(states)
        return self.each(lambda rank: self.checkpointers[rank].restore(given[rank], **options))

    def close(self) -> None:
        self.each(lambda rank: self.checkpointers[rank].close())
        self._ranks.end()

    def __enter__(self) -> StageJob:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


class Stage:
    """A stage's share of four layers, with weights and biases in groups of their own."""

    def __init__(self, rank: int, ranks: int, seed: int = 0, kind: Any = torch.optim.AdamW, **options: Any) -> None:
        torch.manual_seed(seed)
        layers = {f"layer{n}": nn.Linear(WIDTH, WIDTH) for n in range(LAYERS)}
        each = LAYERS // ranks
        self.model = nn.ModuleDict({f"layer{n}": layers[f"layer{n}"] for n in range(rank * each, (rank + 1) * each)})
        decayed = {"params": [layer.weight for layer in self.model.values()]}
        others = {"params": [layer.bias for layer in self.model.values()], "weight_decay": 0.0}
        self.optimizer = kind([decayed, others], lr=0.1, **options)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.state: State = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self) -> None:
        with _one_at_a_time:
            self.optimizer.zero_grad()
            for name, layer in self.model.items():
                layer(torch.ones(WIDTH)).square().sum().mul(1 + int(name[-1])).backward()
            self.optimizer.step()
            self.scheduler.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights and moments by name."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.detach().clone()
            found |= {f"{name} {key}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        return found


def stages(ranks: int, seed: int = 0, **options: Any) -> list[Stage]:
    return [Stage(rank, ranks, seed, **options) for rank in range(ranks)]


def all_tensors(of: Iterable[Stage]) -> dict[str, torch.Tensor]:
    return {name: tensor for stage in of for name, tensor in stage.tensors().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def states(of: Iterable[Stage]) -> list[State]:
    return [stage.state for stage in of]
