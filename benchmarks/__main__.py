"""Measure ckptengine beside the machine's limit and its peers, on the same work.

    python -m benchmarks [what ...] [--runs N] [--scale S] [--only NAME] [--folder DIR] [--json FILE] [--quick]

Each `what` prints its table with every target beside its figure; `all`, the default, runs everything and ends with
all targets. Each benchmark is described in its own file of this folder.
"""

import argparse
import importlib
import inspect
import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from benchmarks.disk import scratch
from benchmarks.machine import facts
from benchmarks.options import Options
from benchmarks.table import Target, show_targets

BENCHMARKS = ("peers", "first", "overhead", "leaves", "memory", "reshard", "scale", "suite")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 where all was measured, met or not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"all, plots, or any of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--runs", type=int, help="counted rounds (default: each benchmark's own number)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the states' sizes (default 1)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only peers with this in the name")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure (default: here)")
    parser.add_argument("--json", type=Path, help="write all figures there; `plots` reads them from there")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="the folder for plots (default: docs)")
    parser.add_argument("--quick", action="store_true", help="one run at a quarter of the size: does it work?")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each process that is started")
    given = parser.parse_args(arguments)
    what = given.what or ["all"]
    if unknown := set(what) - {"all", "plots", *BENCHMARKS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if what == ["plots"]:
        if given.json is None:
            parser.error("plots needs --json FILE, written by an earlier run")
        return _plots(json.loads(given.json.read_text()), given.plots)

    # So that an ended run cleans up, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = [name for name in BENCHMARKS if name in what or "all" in what]
    console = Console(width=None if sys.stdout.isatty() else 150)
    with scratch(given.folder) as folder:
        options = Options(
            folder=folder,
            runs=given.runs or (1 if given.quick else None),
            scale=0.25 if given.quick and given.scale == 1.0 else given.scale,
            only=tuple(given.only),
            timeout=given.timeout,
        )
        results: dict[str, Any] = {"machine": facts(folder), "runs": options.runs, "scale": options.scale}
        failed = False
        for name in chosen:
            try:
                module = importlib.import_module(f"benchmarks.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"benchmarks.{name}":
                    raise
                continue
            try:
                results[name] = call(module.run, options)
            except Exception as error:
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {error}"}
                failed = True
            else:
                _show(name, module, results[name], console)
            if given.json:
                given.json.write_text(json.dumps(results, indent=1))
    if len(chosen) > 1:
        show_targets(console, all_targets(results), "all targets")
    if "plots" in what:
        _plots(results, given.plots)
    return int(failed)


def call(run: Callable[..., dict[str, Any]], options: Options) -> dict[str, Any]:
    """Run a benchmark with the options themselves, or with those of them that it takes by name."""
    names = inspect.signature(run).parameters
    if "options" in names:
        return run(options)
    offered = {"runs": options.runs, "scale": options.scale, "folder": options.folder, "timeout": options.timeout}
    return run(**{name: value for name, value in offered.items() if name in names and value is not None})


def all_targets(results: dict[str, Any]) -> list[Target]:
    """Return the targets of all benchmarks, those of one together."""
    return [
        Target.of({**plain, "what": f"{name}: {plain['what']}"})
        for name in BENCHMARKS
        for plain in results.get(name, {}).get("targets", ())
    ]


def _show(name: str, module: ModuleType, result: dict[str, Any], console: Console) -> None:
    if hasattr(module, "show"):
        module.show(result, console)
    else:
        console.print_json(data=result)
        show_targets(console, (Target.of(plain) for plain in result.get("targets", ())), f"{name}: targets")


def _plots(results: dict[str, Any], folder: Path) -> int:
    from benchmarks import plots

    for file in plots.draw(results, folder):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
