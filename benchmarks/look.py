"""`look`: what the look after a load adds to a load, by `verify=False` and with it in turns.

Three states: few large tensors and their AdamW, many small ones, and a model beside an object that holds a copy of it,
which is summed up whole. Each is loaded cold (its pages dropped from the page cache) and warm. The ratios are taken
within each round: wall time, and CPU time of the whole process, which other work on the machine disturbs less.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn

import ckptengine as ce
from benchmarks.disk import drop_cache, require_room
from benchmarks.options import Options
from benchmarks.rounds import interleaved, spread
from benchmarks.table import Target, show_table, show_targets

NBYTES = 1 << 30
ON, OFF = "with the look", "without"


class Average:
    """Keeps a copy of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._copies = {name: value.detach().clone() for name, value in model.named_parameters()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the copies themselves."""
        return self._copies

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Keep what was loaded."""
        self._copies = state


def trained(layers: int, width: int) -> dict[str, Any]:
    """Return linear layers without bias and their AdamW after a step: 16 bytes for each weight in all."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def averaged(layers: int, width: int) -> dict[str, Any]:
    """Return linear layers and an object that has a copy of them."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    return {"model": model, "average": Average(model)}


def states(scale: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what makes each state, by its name."""
    weights = int(NBYTES * scale) // 12
    layers, width = 100, int((weights / 100) ** 0.5)
    small = max(10, int(1000 * scale))
    return {
        "400 large arrays": functools.partial(trained, layers, width),
        f"{4 * small:,} small arrays": functools.partial(trained, small, 32),
        "a model and a copy of it": functools.partial(averaged, layers, width),
    }


def run(options: Options) -> dict[str, Any]:
    """Return the seconds of loads by state, cache and whether the look is on: wall and CPU."""
    require_room(options.folder, int(2 * NBYTES * options.scale))
    result: dict[str, Any] = {"states": {}}
    for number, (name, make) in enumerate(states(options.scale).items()):
        state, path = make(), options.folder / f"look-{number}"
        ce.save(path, state)
        for cache in ("cold", "warm"):
            subjects = {
                which: functools.partial(_load, path, state, cache == "cold", which == ON) for which in (ON, OFF)
            }
            rounds, errors = interleaved(subjects, options.rounds(7))
            if errors:
                raise RuntimeError(f"{name}: {errors}")
            result["states"][f"{name}, {cache}"] = {
                what: {which: [one[what] for one in measured] for which, measured in rounds.items()}
                for what in ("wall", "cpu")
            }
        del state
    result["targets"] = [target.as_json() for target in targets(result["states"])]
    return result


def _load(path: Any, state: dict[str, Any], cold: bool, verify: bool) -> dict[str, float]:
    if cold:
        drop_cache(path)
    wall, cpu = time.perf_counter(), time.process_time()
    ce.load(path, into=state, verify=verify)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def added(measured: dict[str, list[float]]) -> float:
    """Return what the look adds, in percent of a load without it: the median over the rounds."""
    pairs = zip(measured[ON], measured[OFF], strict=True)
    return 100 * (statistics.median(on / off for on, off in pairs) - 1)


def targets(measured: dict[str, Any]) -> list[Target]:
    """Return what is aimed at: a tenth of a cold load."""
    return [
        Target(f"{name}: the look, % of the load's wall time", added(one["wall"]), 10, "%")
        for name, one in measured.items()
        if name.endswith("cold")
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    rows = [
        (name, what, spread(one[what][OFF]).text(), spread(one[what][ON]).text(), f"{added(one[what]):+.0f} %")
        for name, one in result["states"].items()
        for what in ("wall", "cpu")
    ]
    columns = ("state", "time", OFF, ON, "added (median of the pairs)")
    show_table(console, "look: seconds of a load, median (least–most)", columns, rows, "")
    show_targets(console, (Target.of(one) for one in result["targets"]), "look: targets")
