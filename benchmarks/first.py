"""`first`: the very first save of a process, which has to find memory, plan, and start what the later ones reuse.

Each measurement is a new process that holds the state, touched, in memory. ckptengine is measured twice: as the first
thing that the process does, and with a Checkpointer that has seen the state once, followed by a second of work on all
cores, as in a job that saves after some steps. Peers get the same second after they are made, and torch_checkpointing
the time that its process needs to start; it is also measured prewarmed, the state shown to it beforehand. What comes
unprepared is compared with the best that comes unprepared, the Checkpointer with the best of all.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.disk import remove, require_room
from benchmarks.options import Options
from benchmarks.processes import answer, fresh, job
from benchmarks.rounds import best_of, interleaved, median_ratio, spread
from benchmarks.state import State, gpt2_small, nbytes
from benchmarks.systems import ASYNCHRONOUS, CkptEngine, TorchCheckpointing, use_all_cores
from benchmarks.table import Target, show_table, show_targets

SEEN = "ckptengine, Checkpointer that saw the state"
PREWARMED = "torch_checkpointing, prewarmed"
FULL_NBYTES = 1_493_277_696


def run(options: Options) -> dict[str, Any]:
    """Return the seconds of first saves, by system."""
    require_room(options.folder, int(3 * FULL_NBYTES * options.scale))
    names = [CkptEngine.name, SEEN]
    peers = (*(kind.name for kind in ASYNCHRONOUS if kind is not CkptEngine), PREWARMED)
    names += [name for name in peers if options.wants(name)]
    subjects = {name: _in_a_process(name, options) for name in names}
    rounds, errors = interleaved(subjects, options.rounds(5), warmup=0)
    systems = {
        name: {"stall": [one["stall"] for one in measured], "durable": [one["durable"] for one in measured]}
        for name, measured in rounds.items()
    }
    result = {"systems": systems, "errors": errors}
    result["nbytes"] = next((one[0]["nbytes"] for one in rounds.values()), None)
    result["targets"] = [target.as_json() for target in targets(systems)]
    return result


def _in_a_process(name: str, options: Options) -> Callable[[], Any]:
    def measure() -> Any:
        folder = options.folder / "first"
        remove(folder)
        folder.mkdir()
        arguments = {"system": name, "scale": options.scale, "folder": str(folder)}
        return fresh("benchmarks.first", arguments, options.folder, options.timeout)

    return measure


def first_save(name: str, state: State, folder: Path) -> tuple[float, float]:
    """Make the system and return stall and durable of its first save, in seconds."""
    if name == SEEN:
        return _checkpointer_that_saw(state, folder)
    if name == CkptEngine.name:
        return CkptEngine(folder, state).save(state)
    kind = TorchCheckpointing if name == PREWARMED else next(kind for kind in ASYNCHRONOUS if kind.name == name)
    system = kind(folder, state)
    try:
        if isinstance(system, TorchCheckpointing):
            system.wait_for_process()
        if name == PREWARMED:
            system.prewarm(state)
        train(1.0)
        seconds: tuple[float, float] = system.save(state)
        return seconds
    finally:
        system.close()


def _checkpointer_that_saw(state: State, folder: Path) -> tuple[float, float]:
    import ckptengine as ce

    with ce.Checkpointer(folder / "run", every=2) as checkpointer:
        checkpointer.step(1, state)
        train(1.0)
        began = time.perf_counter()
        handle = checkpointer.step(2, state)
        stall = time.perf_counter() - began
        assert handle is not None
        handle.durable.result()
        return stall, time.perf_counter() - began


def train(seconds: float) -> None:
    """Keep all cores busy for this long."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, b)


def targets(systems: dict[str, Any]) -> list[Target]:
    """Return ckptengine's first save against the best comparable peer of each round."""
    peers = {name: one for name, one in systems.items() if not name.startswith(CkptEngine.name)}
    unprepared = {name: one for name, one in peers.items() if name != PREWARMED}
    found = []
    for ours, theirs in ((CkptEngine.name, unprepared), (SEEN, peers)):
        for measure in ("stall", "durable"):
            figure = None
            if ours in systems and theirs:
                best = best_of([one[measure] for one in theirs.values()])
                figure = median_ratio(systems[ours][measure], best)
            found.append(Target(f"first {measure} of {ours}, against the best peer's", figure, 1.0))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    rows = [
        (name, spread(one["stall"]).text(), spread(one["durable"]).text(), str(len(one["stall"])))
        for name, one in sorted(result["systems"].items(), key=lambda item: statistics.median(item[1]["stall"]))
    ]
    rows += [(name, "failed", error, "") for name, error in result["errors"].items()]
    size = f"{(result['nbytes'] or 0) / 1e9:.2f} GB"
    title = f"first: the first save of a process, {size}; seconds, median (least–most)"
    show_table(console, title, ("system", "stall", "durable", "processes"), rows)
    show_targets(console, (Target.of(one) for one in result["targets"]), "first: targets")


def main() -> None:
    """Measure in this process, for `fresh`."""
    arguments = job()
    use_all_cores()
    state = gpt2_small(arguments["scale"])
    stall, durable = first_save(arguments["system"], state, Path(arguments["folder"]))
    answer(arguments, {"stall": stall, "durable": durable, "nbytes": nbytes(state)})


if __name__ == "__main__":
    main()
