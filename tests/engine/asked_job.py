"""A rank whose objects hold collectives in `state_dict`, while the ranks' states change differently."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckptengine as ce
from ckptengine.errors import CheckpointError


class Metric:
    """Sums over the ranks whenever its state is asked for, and counts how often that is."""

    def __init__(self, log: list[str], name: str) -> None:
        self.total, self.log, self.name = torch.zeros(2), log, name

    def state_dict(self) -> dict[str, Any]:
        self.log.append(self.name)
        total = self.total.clone()
        dist.all_reduce(total)
        return {"total": total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


class Counted(nn.Linear):
    """A module that does the same."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(2, 2)
        self.log = log

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append("module")
        dist.all_reduce(torch.ones(1))
        return super().state_dict(*args, **kwargs)


class Odd:
    """Its state can't be taken on one rank."""

    def __init__(self) -> None:
        self.broken = False

    def state_dict(self) -> dict[str, Any]:
        if self.broken:
            raise KeyError("cursor")
        return {"cursor": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    rank = dist.get_rank()
    torch.manual_seed(1)
    log: list[str] = []
    seen: list[int] = []
    odd = Odd()
    state = {
        "odd": odd,
        "seen": ce.PerRank({"list": seen}),
        "first": Metric(log, "first"),
        "model": Counted(log),
        "second": ce.PerRank(Metric(log, "second")),
    }
    calls: list[list[str]] = []

    def note() -> None:
        calls.append(log.copy())
        log.clear()
        dist.all_reduce(torch.ones(1))  # would be taken for one of a metric's, if a rank had called one more

    with ce.Checkpointer(folder / "run", every=1, on_error="warn") as checkpointer:
        checkpointer.restore(state)
        note()
        for step in range(1, 8):
            if step in (3, 5) and rank == 1:
                state["seen"].value[f"array-{step}"] = torch.zeros(step)  # another structure on this rank alone
            if step == 4:
                state["both"] = torch.ones(3)
            odd.broken = step == 6 and rank == 1
            try:
                checkpointer.step(step, state)
                checkpointer.wait(30)
            except CheckpointError:
                assert odd.broken or step == 6
            note()
        odd.broken = False
    ce.save(folder / "checked", state, check_replicas=True)
    note()
    ce.load(folder / "checked", into=state)
    note()
    (folder / f"rank-{rank}.json").write_text(json.dumps({"calls": calls}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
