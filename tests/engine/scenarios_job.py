"""Runs all scenarios on three ranks, then what two of them do with what was saved."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from groups import group, report
from scenario_tools import Scenario, all_scenarios
from torch.distributed.distributed_c10d import _get_default_store

from ckptengine.comm.exchange import StoreCommunicator
from ckptengine.comm.torch import TorchStore


def run(scenarios: dict[str, Scenario], folder: Path) -> dict[str, str]:
    """Run each with a communicator of its own, so that one that fails does not take others with it."""
    problems = {}
    store = TorchStore(_get_default_store())
    for name, scenario in scenarios.items():
        dist.barrier()
        comm = StoreCommunicator(store, dist.get_rank(), dist.get_world_size(), name, background=store)
        (folder / name).mkdir(exist_ok=True)
        try:
            scenario(comm, folder / name)
        except BaseException:
            problems[name] = traceback.format_exc()
    return problems


def main() -> None:
    folder = Path(sys.argv[1])
    only = set(sys.argv[2:])
    torch.set_num_threads(1)
    problems: dict[str, str] = {}
    for scenarios, size in zip(all_scenarios(), (3, 2), strict=True):
        chosen = {name: scenario for name, scenario in scenarios.items() if not only or name in only}
        with group(f"size-{size}", size) as mine:
            if mine:
                for name, problem in run(chosen, folder).items():
                    problems[name] = f"{problems.get(name, '')}\nwith {size} ranks: {problem}"
    report(folder, problems)


if __name__ == "__main__":
    main()
