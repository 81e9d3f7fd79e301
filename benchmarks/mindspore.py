"""`mindspore`: saves of 300 MB of parameters by MindSpore's own `save_checkpoint` in its three ways, and by ckptengine.

All four are measured in turn in one process, which holds the parameters. The call is what `save_checkpoint` takes. The
stall is that and by how much longer than before it a change of all parameters takes that follows at once, as an
optimizer's step does: where MindSpore saves in a process it forks, and the pages that are then shared are copied when
they are first written to. Durable is when the bytes and their directory entries are on the disk; MindSpore syncs
nothing, so that is done for it, within durable. Each save is one to a new path.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.disk import remove, require_room, sync_tree
from benchmarks.options import Options
from benchmarks.processes import answer, fresh, job
from benchmarks.rounds import best_of, interleaved, median_ratio, spread
from benchmarks.table import OURS, Target, show_table, show_targets

Seconds = dict[str, float]
MEASURES = ("call", "stall", "durable")
WIDTH, LAYERS = 1024, 71  # with their biases 298 MB
WAYS: dict[str, bool | str] = {
    "mindspore, async_save=False": False,
    'mindspore, async_save="thread"': "thread",
    'mindspore, async_save="process"': "process",
}


def run(options: Options) -> dict[str, Any]:
    """Return the seconds of saves, by system."""
    layers = max(1, round(LAYERS * options.scale))
    require_room(options.folder, 3 * layers * (WIDTH + 1) * WIDTH * 4)
    folder = options.folder / "mindspore"
    folder.mkdir()
    arguments = {"folder": str(folder), "layers": layers, "rounds": options.rounds(7)}
    arguments["names"] = [OURS, *filter(options.wants, WAYS)]
    result: dict[str, Any] = fresh("benchmarks.mindspore", arguments, options.folder, options.timeout)
    result["targets"] = [target.as_json() for target in targets(result["systems"])]
    return result


def measured(arguments: dict[str, Any]) -> dict[str, Any]:
    """Measure all systems in this process."""
    import mindspore as ms
    from mindspore import nn

    from ckptengine.mindspore import checkpoint

    cell = nn.CellList([nn.Dense(WIDTH, WIDTH) for _ in range(arguments["layers"])])
    folder = Path(arguments["folder"])

    def change() -> float:
        """Change all parameters in place and return the seconds."""
        began = time.perf_counter()
        for parameter in cell.get_parameters():
            parameter.asnumpy()[...] += 1
        return time.perf_counter() - began

    def timed(save: Callable[[], None], wait: Callable[[], None]) -> Seconds:
        before = min(change() for _ in range(3))
        began = time.perf_counter()
        save()
        call = time.perf_counter() - began
        stall = call + max(0.0, change() - before)
        wait()
        return {"call": call, "stall": stall, "durable": time.perf_counter() - began}

    def ours() -> Seconds:
        path = folder / "ours.ckpt"
        remove(path)
        found = timed(
            lambda: checkpoint.save_checkpoint(cell, str(path), async_save=True), lambda: checkpoint.wait_for_save()
        )
        checkpoint.settle()
        return found

    def theirs(way: bool | str) -> Callable[[], Seconds]:
        path = folder / f"theirs-{way}"

        def wait() -> None:
            while ms.async_ckpt_thread_status():
                time.sleep(0.002)
            for child in multiprocessing.active_children():
                child.join()
            sync_tree(path)

        def save() -> Seconds:
            remove(path)
            path.mkdir()
            return timed(lambda: ms.save_checkpoint(cell, str(path / "a.ckpt"), async_save=way), wait)

        return save

    subjects = {OURS: ours} | {name: theirs(way) for name, way in WAYS.items()}
    chosen = {name: subjects[name] for name in arguments["names"]}
    rounds, errors = interleaved(chosen, arguments["rounds"])
    systems = {
        name: {measure: [one[measure] for one in values] for measure in MEASURES} for name, values in rounds.items()
    }
    nbytes = sum(parameter.nbytes for parameter in cell.get_parameters())
    return {"systems": systems, "errors": errors, "nbytes": nbytes}


def targets(systems: dict[str, Any]) -> list[Target]:
    """Return how many times longer MindSpore's best of each round took."""
    peers = [one for name, one in systems.items() if name != OURS]
    found = []
    for measure, bound in (("stall", 5.0), ("durable", 2.0)):
        figure = None
        if OURS in systems and peers:
            figure = median_ratio(best_of([one[measure] for one in peers]), systems[OURS][measure])
        found.append(Target(f"{measure} of MindSpore's best, over ckptengine's", figure, bound, at_most=False))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    rows = [
        (name, *(spread(one[measure]).text() for measure in MEASURES), str(len(one["stall"])))
        for name, one in sorted(result["systems"].items(), key=lambda item: statistics.median(item[1]["stall"]))
    ]
    rows += [(name, "failed", error, "", "") for name, error in result["errors"].items()]
    title = f"mindspore: saves of {result['nbytes'] / 1e6:.0f} MB; seconds, median (least–most)"
    show_table(console, title, ("system", *MEASURES, "rounds"), rows)
    show_targets(console, (Target.of(one) for one in result["targets"]), "mindspore: targets")


if __name__ == "__main__":
    given = job()
    answer(given, measured(given))
