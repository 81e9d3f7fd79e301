"""`tiers`: what the memory tier costs a save, and what it saves a restart.

Two Checkpointers of one process save one state in turn, one of them with `memory`: stall, durable, and for that one
when the step was in memory, which is what a process that is killed resumes from. Then the process ends as a killed one
does, and new processes restore, in turn, from memory and from the disk, whose cached pages are dropped: the time from
making the Checkpointer to the restored state. Every value that was restored is compared.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.disk import drop_cache, require_room
from benchmarks.options import Options
from benchmarks.processes import answer, fresh, job
from benchmarks.rounds import interleaved, median_ratio, spread
from benchmarks.state import State, gpt2_small, nbytes
from benchmarks.systems import use_all_cores
from benchmarks.table import Target, show_table, show_targets

DISK, MEMORY = "ckptengine", "ckptengine, memory tier"
FULL_NBYTES = 1_493_277_696


def run(options: Options) -> dict[str, Any]:
    """Return the seconds of saves and of restores, with and without memory."""
    needed = int(FULL_NBYTES * options.scale)
    require_room(options.folder, 5 * needed)
    require_room(Path("/dev/shm"), 3 * needed)
    memory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="ckptengine-bench-"))
    try:
        common = {"scale": options.scale, "folder": str(options.folder), "memory": str(memory)}
        arguments = {**common, "what": "save", "rounds": options.rounds(7)}
        saved = fresh("benchmarks.tiers", arguments, options.folder, options.timeout)
        subjects = {name: _restore(name, common, options) for name in (DISK, MEMORY)}
        restored, errors = interleaved(subjects, options.rounds(7))
    finally:
        shutil.rmtree(memory)
    result = {**saved, "restores": restored, "errors": {**saved["errors"], **errors}}
    result["targets"] = [target.as_json() for target in targets(result)]
    return result


def _restore(name: str, common: dict[str, Any], options: Options) -> Callable[[], float]:
    def measure() -> float:
        drop_cache(options.folder)
        arguments = {**common, "what": name}
        return float(fresh("benchmarks.tiers", arguments, options.folder, options.timeout))

    return measure


def save(state: State, folder: Path, memory: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds of saves with and without memory, in turn; leave what a killed process leaves."""
    import ckptengine as ce
    from ckptengine.catalog.listing import newest
    from ckptengine.storage.local import LocalStorage
    from ckptengine.tiers.memory import memory_root

    checkpointers = {
        DISK: ce.Checkpointer(folder / "disk", keep_last=1, preemption=None),
        MEMORY: ce.Checkpointer(folder / "run", keep_last=1, preemption=None, memory=memory),
    }
    root = LocalStorage(memory_root(str(folder / "run"), memory))
    steps = dict.fromkeys(checkpointers, 0)

    def subject(name: str) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            os.sync()
            steps[name] += 1
            began = time.perf_counter()
            handle = checkpointers[name].save(steps[name], state)
            seconds = {"stall": time.perf_counter() - began}
            while name == MEMORY and ((found := newest(root)) is None or found.step != steps[name]):
                time.sleep(0.002)
            seconds["kept"] = time.perf_counter() - began
            stats = handle.durable.result()
            assert stats is not None
            return {**seconds, "durable": stats.durable_seconds}

        return measure

    measured, errors = interleaved({name: subject(name) for name in checkpointers}, rounds, warmup=2)
    return {"saves": measured, "errors": errors, "nbytes": nbytes(state)}


def restore(state: State, folder: Path, memory: Path | bool) -> float:
    """Return the seconds from the beginning of a job's life to the restored state."""
    import ckptengine as ce

    began = time.perf_counter()
    checkpointer = ce.Checkpointer(folder / "run", preemption=None, memory=memory)
    step = checkpointer.restore(state)
    seconds = time.perf_counter() - began
    if step is None:
        raise RuntimeError(f"{folder / 'run'} has no checkpoint")
    return seconds


def targets(result: dict[str, Any]) -> list[Target]:
    """Return that the memory tier costs a save next to nothing, and is quicker than the disk at a restart."""
    saves, restores = result["saves"], result["restores"]
    figures: list[float | None] = [None, None, None]
    if DISK in saves and MEMORY in saves:
        for number, measure in enumerate(("stall", "durable")):
            ours, without = ([one[measure] for one in saves[name]] for name in (MEMORY, DISK))
            figures[number] = median_ratio(ours, without)
    if DISK in restores and MEMORY in restores:
        figures[2] = median_ratio(restores[MEMORY], restores[DISK])
    return [
        Target("stall with the memory tier, against without", figures[0], 1.1),
        Target("durable with the memory tier, against without", figures[1], 1.1),
        Target("restored from memory, against from a cold disk", figures[2], 1.0),
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    rows = []
    for name in (DISK, MEMORY):
        saves, restores = result["saves"].get(name, []), result["restores"].get(name, [])
        cells = [spread([one[measure] for one in saves]).text() if saves else "failed" for measure in ("stall", "kept")]
        cells[1] = cells[1] if name == MEMORY else "–"
        durable = spread([one["durable"] for one in saves]).text() if saves else "failed"
        rows.append((name, *cells, durable, spread(restores).text() if restores else "failed"))
    rows += [(name, "failed", error, "", "") for name, error in result["errors"].items()]
    title = f"tiers: {result['nbytes'] / 1e9:.2f} GB, one process; seconds, median (least–most)"
    show_table(console, title, ("", "stall", "in memory", "durable", "restored"), rows)
    show_targets(console, (Target.of(one) for one in result["targets"]), "tiers: targets")


def main() -> None:
    """Measure in this process, for `fresh`."""
    arguments = job()
    use_all_cores()
    folder, memory = Path(arguments["folder"]), Path(arguments["memory"])
    state = gpt2_small(arguments["scale"])
    if arguments["what"] == "save":
        answer(arguments, save(state, folder, memory, arguments["rounds"]))
    else:
        filled = {name: torch.ones_like(tensor) for name, tensor in state.items()}
        seconds = restore(filled, folder, memory if arguments["what"] == MEMORY else False)
        if not all(torch.equal(filled[name], tensor) for name, tensor in state.items()):
            raise RuntimeError("what was restored is not what was saved")
        answer(arguments, seconds)
    os._exit(0)  # as a killed process ends: what is in memory stays


if __name__ == "__main__":
    main()
