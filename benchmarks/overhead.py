"""`overhead`: how much training time a save costs in all, the stall and what the background takes.

A GPT trains on all cores. Windows of N steps that begin with a save are paired with windows without one, in an order
that alternates; the time lost is the median over the pairs of the difference. A window is long enough that its save
becomes durable within it: a pair in which it doesn't is taken again with longer windows.
"""

import functools
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.disk import require_room
from benchmarks.options import Options
from benchmarks.rounds import progress, spread
from benchmarks.state import nbytes
from benchmarks.systems import DcpAsync, DcpAsyncCached, TorchCheckpointing, use_all_cores
from benchmarks.table import Target, show_table, show_targets
from benchmarks.training import Training

MARGIN = 1.5
"""How much longer a window is than the save took in a window before."""

MOST_STEPS = 400


class _Engine:
    """ckptengine's Checkpointer; what it keeps and deletes happens within the windows, as in a job."""

    def __init__(self, training: Training, folder: Path, **options: Any) -> None:
        import ckptengine as ce

        self._checkpointer = ce.Checkpointer(folder, keep_last=1, **options)
        self._state = training.objects()
        self._step = 0

    def begin(self) -> Callable[[], bool]:
        """Start a save, and return what tells whether it is durable."""
        self._step += 1
        handle = self._checkpointer.save(self._step, self._state)
        return lambda: handle.durable.done() and handle.durable.result() is not None

    def tidy(self) -> None:
        pass

    def close(self) -> None:
        self._checkpointer.close()


class _Peer:
    """A peer that saves a flat dict, made beforehand; its old checkpoints are deleted between the windows."""

    def __init__(self, kind: Any, training: Training, folder: Path) -> None:
        folder.mkdir()
        self._state = training.tensors()
        self._system = kind(folder, self._state)

    def begin(self) -> Callable[[], bool]:
        done = self._system.begin(self._state)
        return lambda: done.done() and (done.result(), True)[1]

    def tidy(self) -> None:
        shutil.rmtree(self._system.path, ignore_errors=True)

    def close(self) -> None:
        self._system.close()


def makers(training: Training, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what makes each saver, by its name."""
    return {
        "ckptengine": functools.partial(_Engine, training, folder / "eager"),
        "ckptengine, overlap": functools.partial(_Engine, training, folder / "overlap", overlap=True),
        **{
            kind.name: functools.partial(_Peer, kind, training, folder / kind.__name__)
            for kind in (TorchCheckpointing, DcpAsyncCached, DcpAsync)
        },
    }


def run(options: Options) -> dict[str, Any]:
    """Return the seconds that each pair lost, by system."""
    use_all_cores()
    training = Training(options.scale)
    state_nbytes = nbytes(training.tensors())
    require_room(options.folder, 8 * state_nbytes)
    savers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, make in makers(training, options.folder).items():
        if not (name.startswith("ckptengine") or options.wants(name)):
            continue
        try:
            savers[name] = make()
        except Exception as error:
            absent = isinstance(error, TypeError) and "'overlap'" in str(error)
            errors[name] = "this version has no overlap" if absent else f"{type(error).__name__}: {error}"
    try:
        systems = _measure(training, savers, options.rounds(7), errors)
    finally:
        for saver in savers.values():
            saver.close()
    result = {"nbytes": state_nbytes, "systems": systems, "errors": errors}
    result["targets"] = [target.as_json() for target in targets(systems)]
    return result


def _measure(training: Training, savers: dict[str, Any], pairs: int, errors: dict[str, str]) -> dict[str, Any]:
    steps: dict[str, int] = {}
    for name, saver in list(savers.items()):
        try:
            for _ in range(2):  # the first save allocates and plans
                progress(f"overhead, warming up: {name}")
                steps[name] = max(4, int(MARGIN * _steps_to_durable(training, saver)) + 1)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
            saver.close()
            del savers[name]
    lost: dict[str, list[tuple[float, float]]] = {name: [] for name in savers}
    for number in range(pairs):
        for name, saver in savers.items():
            progress(f"overhead, pair {number + 1} of {pairs}: {name}, windows of {steps[name]} steps")
            pair = None
            while pair is None:
                pair = _pair(training, saver, steps[name], save_first=number % 2 == 0)
                if pair is None:
                    steps[name] = int(steps[name] * MARGIN) + 1
                    if steps[name] > MOST_STEPS:
                        raise TimeoutError(f"{name}: a save is not durable within {MOST_STEPS} steps")
            lost[name].append(pair)
    return {
        name: {
            "steps": steps[name],
            "with_save": [pair[0] for pair in measured],
            "without": [pair[1] for pair in measured],
            "lost": [pair[0] - pair[1] for pair in measured],
        }
        for name, measured in lost.items()
    }


def _steps_to_durable(training: Training, saver: Any) -> int:
    """Save, train until it is durable, and return how many steps that took."""
    durable, steps = saver.begin(), 0
    while not durable():
        training.step()
        steps += 1
        if steps > MOST_STEPS:
            raise TimeoutError(f"a save is not durable after {MOST_STEPS} steps")
    saver.tidy()
    return steps


def _pair(training: Training, saver: Any, steps: int, save_first: bool) -> tuple[float, float] | None:
    """Return the seconds of a window with and one without a save; None where the save took longer than its window."""
    seconds = {}
    for with_save in (save_first, not save_first):
        durable: Callable[[], bool] = lambda: True  # noqa: E731
        began = time.perf_counter()
        if with_save:
            durable = saver.begin()
        for _ in range(steps):
            training.step()
        seconds[with_save] = time.perf_counter() - began
        if not durable():
            while not durable():
                training.step()
            saver.tidy()
            return None
        saver.tidy()
    return seconds[True], seconds[False]


def targets(systems: dict[str, Any]) -> list[Target]:
    """Return ckptengine's loss over DCP's; the default `async_save` is what is promised, the other for information."""
    lost = {name: statistics.median(one["lost"]) for name, one in systems.items()}
    found = []
    for ours in ("ckptengine", "ckptengine, overlap"):
        for theirs in (DcpAsync.name, DcpAsyncCached.name):
            if ours in lost:
                figure = lost[ours] / lost[theirs] if lost.get(theirs, 0.0) > 0 else None
                found.append(Target(f"training time lost by a save: {ours} / {theirs}", figure, 0.25))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    rows = []
    for name, one in result["systems"].items():
        step = statistics.median(one["without"]) / one["steps"]
        lost = statistics.median(one["lost"])
        rows.append((name, spread(one["lost"]).text(), f"{lost / step:.2f}", str(one["steps"]), f"{step:.3f}"))
    rows += [(name, error, "", "", "") for name, error in result["errors"].items()]
    title = f"overhead: training while {result['nbytes'] / 1e6:.0f} MB are saved; seconds, median (least–most)"
    show_table(console, title, ("system", "lost per save", "in steps", "steps in a window", "a step takes"), rows)
    show_targets(console, (Target.of(one) for one in result["targets"]), "overhead: targets")
