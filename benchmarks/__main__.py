"""Save and load the same state by every system in turn, and print medians, spread and ratios.

    python -m benchmarks [--runs 5] [--scale 1.0] [--folder DIR] [--json FILE]

Runs are interleaved: each round takes every system once, so that a slow minute of the machine falls on all. A first
round, not counted, warms up. Loads are cold: the page cache of the files is dropped before. Ratios are medians of the
ratios within the rounds.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.state import gpt2_small, nbytes
from benchmarks.systems import SYSTEMS, CkptEngine, Limit

MEASURES = ("stall", "durable", "load")


def drop_cache(folder: Path) -> None:
    """Write back and forget the cached pages of all files below a folder."""
    for file in list(folder.rglob("*")):
        if file.is_file():
            try:
                fd = os.open(file, os.O_RDONLY)
            except FileNotFoundError:
                continue  # of the checkpoint before, which is being deleted
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(runs: int, scale: float, folder: Path) -> dict[str, object]:
    """Return all seconds, by system and measure."""
    state = gpt2_small(scale)
    expected = {name: tensor.clone() for name, tensor in list(state.items())[:3]}
    systems = [system(folder, state) for system in SYSTEMS]
    seconds: dict[str, dict[str, list[float]]] = {s.name: {m: [] for m in MEASURES} for s in systems}
    for number in range(runs + 1):
        for system in systems:
            gc.collect()
            stall, durable = system.save(state)
            drop_cache(folder)
            for name in expected:
                state[name].zero_()
            began = time.perf_counter()
            system.load(state)
            load = time.perf_counter() - began
            for name, tensor in expected.items():
                if not torch.equal(state[name], tensor):
                    raise AssertionError(f"{system.name}: {name} came back changed")
            if number:
                for measure_name, value in zip(MEASURES, (stall, durable, load), strict=True):
                    seconds[system.name][measure_name].append(value)
    return {"nbytes": nbytes(state), "tensors": len(state), "runs": runs, "seconds": seconds}


def ratio(a: list[float], b: list[float]) -> float:
    """Return the median over the rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def show(result: dict) -> None:
    """Print the table."""
    console = Console(width=120)
    size = f"{result['nbytes'] / 1e9:.2f} GB in {result['tensors']} tensors, {result['runs']} rounds"
    table = Table(title=f"{size}: median seconds (min to max), and the median ratio to the limit's")
    table.add_column("system")
    for name in MEASURES:
        table.add_column("cold load" if name == "load" else name, justify="right")
    limit = result["seconds"][Limit.name]
    for system, measures in result["seconds"].items():
        cells = [
            f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})  {ratio(v, limit[name]):.2f}x"
            for name, v in measures.items()
        ]
        table.add_row(system, *cells, style="bold" if system == CkptEngine.name else None)
    console.print(table)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the model's width")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: a new one here)")
    parser.add_argument("--json", type=Path, default=None, help="also write all figures there")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(dir=arguments.folder or Path.cwd(), prefix="bench-") as folder:
        result = measure(arguments.runs, arguments.scale, Path(folder))
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
