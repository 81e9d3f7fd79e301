"""What the scenarios share: their list, groups that count or lack something, states."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ckptengine as ce
from ckptengine.comm.base import Communicator, KeyValueStore

Scenario = Callable[[Communicator, Path], None]
SCENARIOS: dict[str, Scenario] = {}
SMALLER: dict[str, Scenario] = {}
"""What the first two ranks do afterwards with what the three have saved under the same name."""


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def smaller(function: Scenario) -> Scenario:
    SMALLER[function.__name__.removesuffix("_by_two")] = function
    return function


def all_scenarios() -> tuple[dict[str, Scenario], dict[str, Scenario]]:
    """Return what the modules of scenarios register: for three ranks, and for two of them afterwards."""
    for module in ("scenarios", "scenarios_in_time"):
        importlib.import_module(module)
    return SCENARIOS, SMALLER


class Counting(Communicator):
    """Counts the operations in which ranks wait for each other."""

    def __init__(self, inner: Communicator) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self.inner, self.count = inner, 0

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        self.count += 1
        return self.inner.all_gather(value, timeout)

    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        self.count += 1
        return self.inner.broadcast(value, timeout, root)

    def barrier(self, timeout: float) -> None:
        self.count += 1
        self.inner.barrier(timeout)

    def store(self) -> KeyValueStore | None:
        return self.inner.store()

    def taken(self) -> int:
        """Return the count since the last call."""
        count, self.count = self.count, 0
        return count


class WithoutStore(Counting):
    """A group that has no store for background messages: they go through the checkpoint's storage."""

    def store(self) -> None:
        return None


def rows(comm: Communicator, fill: float, total: int = 7) -> ce.ShardedArray:
    """Return this rank's part of a table whose element [i, j] is fill + 10 i + j."""
    mine = np.array_split(np.arange(total), comm.world_size)[comm.rank]
    part = fill + 10.0 * mine[:, None] + np.arange(3.0)[None]
    return ce.ShardedArray(part, (total, 3), (int(mine[0]) if mine.size else total, 0))


def table(fill: float, total: int = 7) -> np.ndarray:
    return fill + 10.0 * np.arange(total)[:, None] + np.arange(3.0)[None]


def checkpointer(comm: Communicator, folder: Path, **options: Any) -> ce.Checkpointer:
    return ce.Checkpointer(folder, **{"every": 1, "timeout": 20.0, "comm": comm, **options})


def step_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def archive_of(folder: Path, rank: int) -> Path:
    (path,) = folder.glob(f"data-*/rank-{rank:05d}.zarr.zip")
    return path


def net() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Linear(5, 3)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5 + 0.25
    optimizer.step()


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Return the bits of a model and of its optimizer's state."""
    found = {name: value.detach().numpy().tobytes() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = value.numpy().tobytes()
    return found
