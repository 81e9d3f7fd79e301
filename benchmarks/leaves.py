"""`leaves`: many small tensors, where what is done for each of them counts, not the bytes.

100,000 tensors of 4 KiB, from the second save on, beside DCP's `async_save`; then the state of a module and its
AdamW, which a save has to walk through. The Python time of a save is its stall without the copy of the bytes, which the
engine reports as a phase of its own.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.disk import remove, require_room
from benchmarks.limit import Copier, warm_memory
from benchmarks.options import Options
from benchmarks.rounds import interleaved, median_ratio, spread
from benchmarks.state import many_leaves, nbytes
from benchmarks.systems import CkptEngine, DcpAsync, use_all_cores
from benchmarks.table import Target, show_table, show_targets

COUNT, MODULE_LEAVES = 100_000, 20_000
COPY = "memcpy of the same bytes, in one piece"
MODULE = "ckptengine, module and AdamW"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of one save; a mere copy has no other than its own. `copied`: what of the stall was the copy in C."""

    stall: float
    durable: float
    copied: float = 0.0


def run(options: Options) -> dict[str, Any]:
    """Return seconds by system, for the small tensors and for the module."""
    use_all_cores()
    count = max(100, int(COUNT * options.scale))
    state = many_leaves(count)
    require_room(options.folder, 4 * nbytes(state))
    module_state, module_leaves, module_nbytes = module_and_optimizer(max(400, int(MODULE_LEAVES * options.scale)))
    copy = _copier(nbytes(state))
    engine = CkptEngine(options.folder, state)
    subjects: dict[str, Callable[[], Measured]] = {
        COPY: copy,
        CkptEngine.name: _saves(engine, state),
        DcpAsync.name: _saves(DcpAsync(options.folder, state), state),
    }
    rounds, errors = interleaved(subjects, options.rounds(3))
    del state, copy
    module_engine = CkptEngine(options.folder, {})
    module_subjects = {COPY: _copier(module_nbytes), MODULE: _saves(module_engine, module_state)}
    module_rounds, module_errors = interleaved(module_subjects, options.rounds(3))
    result = {
        "leaves": count,
        "module_leaves": module_leaves,
        "systems": _plain(rounds),
        "module": _plain(module_rounds),
        "errors": errors | module_errors,
    }
    if CkptEngine.name in rounds:
        result["python_us_per_leaf"] = python_us_per_leaf(result["systems"], CkptEngine.name, count)
    if MODULE in module_rounds:
        result["module_python_us_per_leaf"] = python_us_per_leaf(result["module"], MODULE, module_leaves)
    result["targets"] = [target.as_json() for target in targets(result)]
    return result


def python_us_per_leaf(systems: Mapping[str, Any], name: str, leaves: int) -> float:
    """Return the microseconds of Python for each leaf: median over the rounds of the stall less the copy in C."""
    pairs = zip(systems[name]["stall"], systems[name]["copied"], strict=True)
    return statistics.median(stall - copy for stall, copy in pairs) / leaves * 1e6


def module_and_optimizer(leaves: int) -> tuple[dict[str, Any], int, int]:
    """Return a module of small layers and its AdamW after a step, about this many tensors in all, and their bytes."""
    module = nn.Sequential(*(nn.Linear(32, 32) for _ in range(max(1, leaves // 8))))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.step()
    tensors = [*module.parameters(), *(t for moments in optimizer.state.values() for t in moments.values())]
    return {"model": module, "optimizer": optimizer}, len(tensors), sum(tensor.nbytes for tensor in tensors)


def _copier(size: int) -> Callable[[], Measured]:
    memory, source = warm_memory(size), torch.ones(size, dtype=torch.uint8)
    copier = Copier(memory, {"all": source})

    def copy() -> Measured:
        began = time.perf_counter()
        copier.copy_in()
        seconds = time.perf_counter() - began
        return Measured(seconds, seconds)

    return copy


def _saves(system: Any, state: Any) -> Callable[[], Measured]:
    def save() -> Measured:
        remove(system.path)
        stall, durable = system.save(state)
        phases = getattr(getattr(system, "stats", None), "phases", ())
        return Measured(stall, durable, sum(phase.seconds for phase in phases if phase.name == "copy"))

    return save


def _plain(rounds: Mapping[str, list[Measured]]) -> dict[str, Any]:
    return {
        name: {field: [getattr(one, field) for one in measured] for field in ("stall", "durable", "copied")}
        for name, measured in rounds.items()
    }


def targets(result: Mapping[str, Any]) -> list[Target]:
    """Return what is promised for many leaves."""
    systems = result["systems"]
    times = None
    if CkptEngine.name in systems and DcpAsync.name in systems:
        times = median_ratio(systems[DcpAsync.name]["durable"], systems[CkptEngine.name]["durable"])
    return [
        Target(f"{result['leaves']:,} leaves: durable, times as fast as DCP async", times, 10, "×", False),
        Target("Python time per leaf, second and later saves", result.get("python_us_per_leaf"), 2, "µs"),
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables and the targets."""
    for title, systems, us in (
        (f"leaves: {result['leaves']:,} of 4 KiB", result["systems"], result.get("python_us_per_leaf")),
        (
            f"leaves: a module and its AdamW, {result['module_leaves']:,}",
            result["module"],
            result.get("module_python_us_per_leaf"),
        ),
    ):
        rows = [(name, spread(one["stall"]).text(), spread(one["durable"]).text()) for name, one in systems.items()]
        note = "" if us is None else f"ckptengine's Python time: {us:.2f} µs per leaf (the stall without the copy)"
        columns = ("system", "stall", "durable")
        show_table(console, f"{title}; seconds, median (least–most)", columns, rows, note)
    for name, error in result["errors"].items():
        console.print(f"{name} failed: {error}")
    show_targets(console, (Target.of(one) for one in result["targets"]), "leaves: targets")
