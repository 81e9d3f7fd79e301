"""FSDP2 that keeps parameters and moments on the CPU (`CPUOffloadPolicy`): `offload_job.py FOLDER`, on three ranks.

What it saves on two of them is loaded on three, without offloading, and whole; and the reverse.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import torch
from groups import group, report
from spread_layouts import LAYOUTS, Built, Net, local_tensors, network, take_steps
from spread_layouts import _adamw as adamw
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import ckptengine as ce


def offloaded(net: Net) -> Built:
    net.conv.to(memory_format=torch.contiguous_format)  # it takes no others
    policy = CPUOffloadPolicy(pin_memory=False)
    for block in net.blocks:
        fully_shard(block, offload_policy=policy)
    fully_shard(net, offload_policy=policy)
    return net, adamw(net)


BUILD: dict[str, Callable[[Net], Built]] = {
    "offloaded": offloaded,
    "fsdp2": LAYOUTS["fsdp2"],
    "whole": LAYOUTS["whole"],
}


def save(folder: Path, name: str, size: int) -> None:
    model, optimizer = BUILD[name](network(1))
    take_steps(model, optimizer)
    ce.save(folder / f"{name}-{size}", {"model": model, "optimizer": optimizer}, timeout=60)


def load(folder: Path, source: str, name: str, *, stepped: bool) -> str:
    """Return what differs from a training in this layout, right after the load and two steps later."""
    model, optimizer = BUILD[name](network(1))
    take_steps(model, optimizer)
    other, its = BUILD[name](network(2))
    if stepped:
        take_steps(other, its, 1)
    try:
        ce.load(folder / source, into={"model": other, "optimizer": its}, timeout=60)
    except Exception:
        return traceback.format_exc(limit=-4)
    wrong = []
    for steps in (0, 2):
        for net, one in ((model, optimizer), (other, its)):
            take_steps(net, one, steps)
        want, have = dict(local_tensors(model, optimizer)), dict(local_tensors(other, its))
        wrong += [f"{key} after {steps}" for key in want if key not in have or not torch.equal(want[key], have[key])]
        wrong += [f"{key} on {value.device}" for key, value in have.items() if value.device.type != "cpu"]
    return ", ".join(wrong)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    with group("two", 2) as mine:
        if mine:
            save(folder, "offloaded", 2)
    with group("three", 3):
        save(folder, "fsdp2", 3)
        for name in BUILD:
            found[f"offloaded by 2 -> {name} by 3"] = load(folder, "offloaded-2", name, stepped=name == "offloaded")
    with group("two again", 2) as mine:
        if mine:
            found["fsdp2 by 3 -> offloaded by 2"] = load(folder, "fsdp2-3", "offloaded", stepped=False)
    report(folder, found)


if __name__ == "__main__":
    main()
