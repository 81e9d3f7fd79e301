"""`memory`: what a save needs above the training's own memory, and a load above the tensors that it fills.

Each is measured in a process of its own, two saves or one load. Two measures are taken, and the larger counts: the
kernel's high-water mark of the process, and the memory of the process and its children, shared pages counted once
(Pss), sampled from outside. Modules that a system needs are imported before.
"""

import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.disk import remove, require_room
from benchmarks.options import Options
from benchmarks.processes import answer, fresh, job
from benchmarks.rounds import interleaved, spread
from benchmarks.state import gpt2_small, nbytes
from benchmarks.systems import ASYNCHRONOUS, CkptEngine, use_all_cores
from benchmarks.table import Target, show_table, show_targets

SAVES = 2
FULL_NBYTES = 1_493_277_696

Sample = tuple[float, int]
"""Seconds on the monotonic clock, and bytes."""


def run(options: Options) -> dict[str, Any]:
    """Return bytes above, by system: of saves, of loads, and of the state itself."""
    require_room(options.folder, int(4 * FULL_NBYTES * options.scale))
    kinds = [kind for kind in ASYNCHRONOUS if kind is CkptEngine or options.wants(kind.name)]
    rounds, errors = interleaved({kind.name: _both(kind.name, options) for kind in kinds}, options.rounds(3), warmup=0)
    systems = {
        name: {
            "save_above": [one["save"] for one in measured],
            "load_above": [one["load"] for one in measured],
            "nbytes": measured[0]["nbytes"],
            "tensors": measured[0]["tensors"],
        }
        for name, measured in rounds.items()
    }
    result: dict[str, Any] = {"systems": systems, "errors": errors}
    result["targets"] = [target.as_json() for target in targets(systems)]
    return result


def _both(name: str, options: Options) -> Callable[[], dict[str, int]]:
    def measure() -> dict[str, int]:
        folder = options.folder / "memory"
        remove(folder)
        folder.mkdir()
        found: dict[str, int] = {}
        for what in ("save", "load"):
            samples: list[Sample] = []
            arguments = {"system": name, "scale": options.scale, "folder": str(folder), "what": what}
            watch = functools.partial(sample, samples)
            reply = fresh("benchmarks.memory", arguments, options.folder, options.timeout, watch)
            found[what] = max(above(samples, reply["began"], reply["ended"]), reply["own"])
            found |= {"nbytes": reply["nbytes"], "tensors": reply["tensors"]}
        return found

    return measure


def sample(samples: list[Sample], pid: int) -> None:
    """Add the memory of a process and its children at this moment; what has ended meanwhile counts as nothing."""
    now, total, pids = time.monotonic(), 0, [pid]
    while pids:
        process = Path("/proc", str(pids.pop()))
        with suppress(OSError):
            total += field(process / "smaps_rollup", "Pss")
            for task in (process / "task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
    samples.append((now, total))


def field(file: Path, name: str) -> int:
    """Return a field of a file below /proc, in bytes."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{file} has no field {name}")


def above(samples: list[Sample], began: float, ended: float) -> int:
    """Return the bytes of the highest sample between two moments above the last one before them."""
    before = [size for when, size in samples if when <= began]
    during = [size for when, size in samples if began <= when <= ended]
    if not before or not during:
        raise ValueError(f"too few samples: {len(before)} before, {len(during)} during")
    return max(during) - before[-1]


def measured(name: str, what: str, scale: float, folder: Path) -> dict[str, Any]:
    """Save or load in this process, and return the moments and the process's own high-water mark above the start."""
    import torch.distributed.checkpoint  # noqa: F401
    import torch_checkpointing  # noqa: F401

    import ckptengine  # noqa: F401

    use_all_cores()
    state = gpt2_small(scale)
    kind = next(kind for kind in ASYNCHRONOUS if kind.name == name)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    time.sleep(0.3)  # so that samples of this moment are taken
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    before, began = field(status, "VmHWM"), time.monotonic()
    system = kind(folder, state)
    if what == "load":
        system.load(state)
    else:
        for _ in range(SAVES):
            remove(system.path)
            system.save(state)
    ended = time.monotonic()
    own = field(status, "VmHWM") - before
    time.sleep(0.1)
    system.close()
    return {"began": began, "ended": ended, "own": own, "nbytes": nbytes(state), "tensors": len(state)}


def targets(systems: dict[str, Any]) -> list[Target]:
    """Return what is promised of memory: one image while saving, bounded buffers while loading."""
    ours = systems.get(CkptEngine.name)
    image = load = None
    if ours:
        image = statistics.median(ours["save_above"]) / ours["nbytes"]
        load = statistics.median(ours["load_above"]) / 1e6
    return [
        Target("memory of a save above the training's, over the bytes of the state", image, 1.02),
        Target("memory of a load above the tensors", load, 256, "MB"),
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    rows = []
    for name, one in result["systems"].items():
        size = one["nbytes"]
        image = spread([value / size for value in one["save_above"]])
        extra = (statistics.median(one["save_above"]) - size) / one["tensors"] / 1e3
        load = spread([value / 1e6 for value in one["load_above"]])
        cells = (f"{image.median:.3f} ({image.least:.3f}–{image.most:.3f})", f"{extra:.0f}", f"{load.median:.0f}")
        rows.append((name, *cells))
    rows += [(name, "failed", error, "") for name, error in result["errors"].items()]
    columns = ("system", "save: above, over the state's bytes", "beyond one image, kB per tensor", "load: MB above")
    show_table(console, "memory: peaks of the process and its children, median (least–most)", columns, rows)
    show_targets(console, (Target.of(one) for one in result["targets"]), "memory: targets")


if __name__ == "__main__":
    given = job()
    answer(given, measured(given["system"], given["what"], given["scale"], Path(given["folder"])))
