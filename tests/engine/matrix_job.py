"""Saves and loads the same state in every layout at every world size, in one job of four processes.

The processes form groups of 1, 2, 3 and 4 one after the other: what one group saved, all others load. `matrix_job.py
FOLDER N`: each layout loads every Nth checkpoint, and each checkpoint is loaded by every Nth layout; with 1 all by all.
"""

from __future__ import annotations

import json
import sys
import traceback
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from groups import group, process_rank, report
from layouts import LAYOUTS, MOMENTS, Tensors, local, named, network, optimizer_of, reference, take_steps
from torch import nn

import ckptengine as ce

TABLE = np.arange(15, dtype=np.int32).reshape(5, 3)
SIZES = (1, 2, 3, 4)


def table(filled: bool) -> ce.ShardedArray:
    """Return this rank's rows of a table that is sharded by hand."""
    parts = np.array_split(np.arange(5), dist.get_world_size())
    rows = parts[dist.get_rank()]
    start = int(rows[0]) if rows.size else 5
    part = TABLE[start : start + rows.size].copy() if filled else np.full((rows.size, 3), -1, np.int32)
    return ce.ShardedArray(part, TABLE.shape, (start, 0))


@cache
def expected(size: int, layout: str) -> dict[str, Tensors]:
    """Return what this rank must hold: the whole tensors, distributed by torch itself."""
    _, kinds = reference()
    return {
        kind: {name: local(value).clone() for name, value in named(LAYOUTS[size][layout](network(1, whole)))}
        for kind, whole in kinds.items()
    }


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
    """Return what this rank holds, as `expected` does."""
    result = {"param": {name: local(value) for name, value in named(model)}}
    for moment in MOMENTS:
        result[moment] = {name: local(optimizer.state[value][moment]) for name, value in named(model)}
    return result


def spoil(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Overwrite what a load is to fill."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            local(tensor).fill_(99)
        for state in optimizer.state.values():
            for tensor in state.values():
                local(tensor).fill_(99)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def differences(model: nn.Module, optimizer: torch.optim.Optimizer, want: dict[str, Tensors]) -> list[str]:
    """Return the names of what this rank does not hold bit for bit."""
    got = held(model, optimizer)
    wrong = []
    for kind, tensors in want.items():
        for name, tensor in tensors.items():
            other = got[kind][name]
            if (tensor.shape, tensor.dtype, bits(tensor)) != (other.shape, other.dtype, bits(other)):
                wrong.append(f"{kind} {name}")
    net, _ = reference()
    have = {name.removeprefix("module."): value for name, value in model.named_buffers()}
    wrong += [f"buffer {name}" for name, value in net.named_buffers() if bits(have[name]) != bits(value)]
    wrong += [f"step {name}" for name, value in named(model) if float(optimizer.state[value]["step"]) != 2]
    bare = getattr(model, "module", model)
    wrong += [] if bare.head.weight is bare.embed.weight else ["the tied weight came apart"]
    return wrong


def save_all(folder: Path, size: int) -> None:
    for layout, build in LAYOUTS[size].items():
        model = build(network(1))
        optimizer = optimizer_of(model)
        take_steps(model, optimizer)
        # That torch's arithmetic does not depend on the sharding is not what is tested here.
        have = held(model, optimizer)
        with torch.no_grad():
            for kind, tensors in expected(size, layout).items():
                for name, value in have[kind].items():
                    value.copy_(tensors[name])
        state = {"model": model, "optimizer": optimizer, "table": table(True), "words": {"step": 2, "pi": 3.5}}
        ce.save(folder / f"{size}-{layout}", state, timeout=60)


def load_all(folder: Path, size: int, nth: int) -> dict[str, str]:
    cases = [f"{other}-{layout}" for other in SIZES for layout in LAYOUTS[other]]
    problems = {}
    for layout, build in LAYOUTS[size].items():
        want = expected(size, layout)
        own = cases.index(f"{size}-{layout}")
        sources = [source for place, source in enumerate(cases) if (place + own) % nth == 0]
        model = build(network(2))
        used = optimizer_of(model)
        take_steps(model, used)
        for number, source in enumerate(sources):
            # Into an optimizer with state of its own, and into a fresh one.
            optimizer = used if number % 2 else optimizer_of(model)
            spoil(model, optimizer)
            part = table(False)
            words = {"step": 0, "pi": 0.0}
            state = {"model": model, "optimizer": optimizer, "table": part, "words": words}
            pair = f"{source} -> {size}-{layout}"
            try:
                report = ce.load(folder / source, into=state, timeout=60)
                wrong = differences(model, optimizer, want)
                wrong += [] if report.complete else [str(report)]
                wrong += [] if np.array_equal(part.local, table(True).local) else ["table"]
                wrong += [] if words == {"step": 2, "pi": 3.5} else ["words"]
                if wrong:
                    problems[pair] = ", ".join(wrong)
            except Exception:
                problems[pair] = traceback.format_exc(limit=-4)
    return problems


def write_reference(folder: Path) -> None:
    """Write the whole tensors for the reader that knows neither torch nor this file."""
    net, kinds = reference()
    arrays = {f"{kind}/{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}
    arrays |= {f"buffer/{name}": tensor for name, tensor in net.named_buffers()}
    raw = {name: np.frombuffer(bits(tensor), np.uint8) for name, tensor in arrays.items()}
    np.savez(folder / "reference.npz", **raw)
    names = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in arrays.items()}
    (folder / "reference.json").write_text(json.dumps(names))


def main() -> None:
    folder, nth = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    problems: dict[str, str] = {}
    for size in SIZES:
        with group(f"save-{size}", size) as mine:
            if mine:
                save_all(folder, size)
    for size in SIZES:
        with group(f"load-{size}", size) as mine:
            if mine:
                problems |= load_all(folder, size, nth)
    if process_rank() == 0:
        write_reference(folder)
    report(folder, problems)


if __name__ == "__main__":
    main()
