"""Benchmarks that are commands of their own, `python -m benchmarks.reshard` and `.scale`: run, and their targets.

Each runs in a new process, prints its own table, and writes its figures with `--json`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.options import Options
from benchmarks.processes import ROOT
from benchmarks.table import Target

NAMES = ("reshard", "scale")
PLANNED_RANKS, PLANNED_LEAVES = 16_384, 2_000


def present(name: str) -> bool:
    """Return whether this benchmark exists."""
    return importlib.util.find_spec(f"benchmarks.{name}") is not None


def run(name: str, options: Options) -> dict[str, Any]:
    """Run the command and return its figures, with their targets; raises what made it fail or take too long."""
    file = options.folder / f"{name}.json"
    arguments = _arguments(name, options)
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", str(file)],
        cwd=ROOT,
        timeout=options.timeout,
        check=True,
    )
    result: dict[str, Any] = json.loads(file.read_text())
    found = reshard_targets(result) if name == "reshard" else scale_targets(result)
    return {**result, "targets": [target.as_json() for target in found]}


def _arguments(name: str, options: Options) -> list[str]:
    if name == "reshard":
        return ["--folder", str(Path(options.folder).resolve()), "--runs", str(options.rounds(5))]
    return ["--ranks", str(max(8, int(PLANNED_RANKS * options.scale))), "--leaves", str(PLANNED_LEAVES)]


def reshard_targets(result: dict[str, Any]) -> list[Target]:
    """Return for each change of sharding the bytes that were read over the bytes needed, in the worst round."""
    return [
        Target(
            f"bytes read over bytes needed, {case}",
            max(one["counted"] / (one["needed"] or result["nbytes"]) for one in systems["ckptengine"]),
            1.05,
        )
        for case, systems in result["cases"].items()
    ]


def scale_targets(result: dict[str, Any]) -> list[Target]:
    """Return what is promised of plans and layout at this number of ranks."""
    size = f"{result['ranks']:,} ranks × {result['leaves']:,} leaves"
    return [
        Target(f"layout file, {size}", result["layout_bytes_per_chunk"], 4, "bytes per chunk"),
        Target(f"a rank's first plan, {size}", result["first_plan_seconds"], 1, "s"),
        Target(f"a rank's later plans, {size}", result["later_plan_seconds"], 0.001, "s"),
    ]
