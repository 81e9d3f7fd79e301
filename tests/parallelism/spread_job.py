"""Saves and loads one network under FSDP1, ZeRO, FSDP2 and whole, at 1 to L ranks: `spread_job.py FOLDER N L`.

What one group of processes has saved, the others load: each layout every Nth checkpoint of those with as many groups.
"""

from __future__ import annotations

import sys
import traceback
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import numpy as np
import torch
import torch.distributed as dist
from groups import group, report
from spread_layouts import LAYOUTS, groups_of, local_tensors, network, take_steps

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.load.loader import LoadOptions, load_newest
from ckptengine.storage.open import open_storage

Arrays = dict[str, np.ndarray]


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def reference(groups: int) -> Arrays:
    """Return what a checkpoint must hold under which name, of the training in one piece."""
    net = network(1)
    names = dict(net.named_parameters(remove_duplicate=False))
    _, optimizer = LAYOUTS["whole" if groups == 2 else "whole-1"](net)
    take_steps(net, optimizer)
    found = {f"model/{name}": value for name, value in net.state_dict().items()}
    for name, parameter in names.items():
        if name != "head.weight":
            found |= {f"optimizer/state/model.{name}/{key}": v for key, v in optimizer.state[parameter].items()}
    return {name: bits(value.detach()) for name, value in found.items()}


def stored(path: Path) -> Arrays:
    """Return what a checkpoint holds, read without torch."""
    found = {}

    def look(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                look(item, f"{name}/{key}" if name else str(key))
        elif isinstance(value, np.ndarray):
            found[name] = value

    look(ce.load(path), "")
    return found


def check_stored(path: Path, want: Arrays) -> list[str]:
    have = stored(path)
    wrong = [f"{name}: missing" for name in want if name not in have]
    wrong += [f"{name}: too much" for name in have if name not in want]
    for name in want.keys() & have.keys():
        dtype, shape, raw = want[name]
        if (have[name].shape, have[name].tobytes()) != (shape, raw):
            wrong.append(f"{name}: other contents ({dtype}, {shape})")
    return wrong


def save_all(folder: Path, size: int) -> dict[str, str]:
    problems = {}
    for layout, build in LAYOUTS.items():
        if size == 1 and layout.startswith("zero"):
            continue
        model, optimizer = build(network(1))
        take_steps(model, optimizer)
        path = folder / f"{size}-{layout}"
        try:
            ce.save(path, {"model": model, "optimizer": optimizer}, timeout=60)
            wrong = check_stored(path, reference(groups_of(layout))) if dist.get_rank() == 0 else []
            if wrong:
                problems[f"{size}-{layout}"] = "; ".join(wrong[:8])
        except Exception:
            problems[f"{size}-{layout}"] = traceback.format_exc(limit=-4)
        dist.barrier()
    return problems


def load_all(folder: Path, size: int, nth: int) -> dict[str, str]:
    cases = sorted(path.name for path in folder.iterdir() if path.is_dir())
    problems = {}
    for number, (layout, build) in enumerate(LAYOUTS.items()):
        model, optimizer = build(network(1))
        take_steps(model, optimizer)
        want = {name: bits(tensor) for name, tensor in local_tensors(model, optimizer)}
        sources = [one for one in cases if groups_of(one.partition("-")[2]) == groups_of(layout)]
        for place, source in enumerate(sources):
            if (place + number + size) % nth:
                continue
            model, optimizer = build(network(2))
            if place // nth % 2:
                take_steps(model, optimizer, 1)
            pair = f"{source} -> {size}-{layout}"
            try:
                storage, state = open_storage(folder / source), {"model": model, "optimizer": optimizer}
                loaded = load_newest(storage, state, current(), 60, LoadOptions())
                have = {name: bits(tensor) for name, tensor in local_tensors(model, optimizer)}
                wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
                read = torch.tensor(loaded.counts.read)
                dist.all_reduce(read)
                wrong += [] if int(read) <= 1.05 * loaded.counts.node_needed else [f"{int(read)} bytes read"]
                wrong += [] if loaded.report.complete else [str(loaded.report)]
                if wrong:
                    problems[pair] = ", ".join(wrong[:8])
            except Exception:
                problems[pair] = traceback.format_exc(limit=-4)
    return problems


def main() -> None:
    folder, nth, sizes = Path(sys.argv[1]), int(sys.argv[2]), range(1, int(sys.argv[3]) + 1)
    torch.set_num_threads(1)
    problems: dict[str, str] = {}
    for size in sizes:
        with group(f"save-{size}", size) as mine:
            if mine:
                problems |= save_all(folder, size)
    for size in sizes:
        with group(f"load-{size}", size) as mine:
            if mine:
                problems |= load_all(folder, size, nth)
    report(folder, problems)


if __name__ == "__main__":
    main()
