"""Measure ckptengine beside the machine's limit and its peers, on the same work.

    python -m benchmarks [what ...] [--runs N] [--scale S] [--only NAME] [--folder DIR] [--json FILE] [--quick]

Each `what` prints its table with every target beside its figure; `all`, the default, runs everything and ends with
all targets. Each benchmark is described in its own file of this folder.
"""

import argparse
import importlib
import json
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import beside
from benchmarks.disk import scratch
from benchmarks.machine import facts
from benchmarks.options import Options
from benchmarks.table import Target, show_targets

BENCHMARKS = (
    "peers",
    "first",
    "overhead",
    "leaves",
    "memory",
    "tiers",
    "reshard",
    "look",
    "scale",
    "suite",
    "mindspore",
)


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
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each process that is started")
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
    chosen = [name for name in chosen if name not in beside.NAMES or beside.present(name)]
    console = Console(width=None if sys.stdout.isatty() else 150)
    with scratch(given.folder) as folder:
        options = Options(
            folder=folder,
            runs=given.runs or (1 if given.quick else None),
            scale=0.25 if given.quick and given.scale == 1.0 else given.scale,
            only=tuple(given.only),
            timeout=given.timeout,
        )
        chosen_options = {"runs": options.runs, "scale": options.scale, "only": options.only}
        results: dict[str, Any] = {"machine": facts(folder), "options": chosen_options}
        failed = False
        for name in chosen:
            try:
                results[name] = _run(name, options, console) if len(chosen) == 1 else _run_apart(name, options)
            except Exception as error:
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            failed = failed or "error" in results[name]
            if given.json:
                given.json.write_text(json.dumps(results, indent=1))
    if len(chosen) > 1:
        show_targets(console, all_targets(results), "all targets")
    if "plots" in what:
        _plots(results, given.plots)
    return int(failed)


def _run(name: str, options: Options, console: Console) -> dict[str, Any]:
    """Run one benchmark and print what it found."""
    if name in beside.NAMES:
        result = beside.run(name, options)
        show_targets(console, (Target.of(plain) for plain in result["targets"]), f"{name}: targets")
        return result
    module = importlib.import_module(f"benchmarks.{name}")
    found: dict[str, Any] = module.run(options)
    module.show(found, console)
    return found


def _run_apart(name: str, options: Options) -> dict[str, Any]:
    """Run one of several benchmarks in a process of its own, so that it begins with no memory of those before."""
    file = options.folder / f"{name}-figures.json"
    command = [sys.executable, "-m", "benchmarks", name, "--scale", str(options.scale), "--json", str(file)]
    command += ["--folder", str(options.folder), "--timeout", str(options.timeout)]
    command += [] if options.runs is None else ["--runs", str(options.runs)]
    command += [part for word in options.only for part in ("--only", word)]
    subprocess.run(command, timeout=options.timeout, check=False)
    found: dict[str, Any] = json.loads(file.read_text())[name]
    return found


def all_targets(results: dict[str, Any]) -> list[Target]:
    """Return the targets of all benchmarks, those of one together."""
    return [
        Target.of({**plain, "what": f"{name}: {plain['what']}"})
        for name in BENCHMARKS
        for plain in results.get(name, {}).get("targets", ())
    ]


def _plots(results: dict[str, Any], folder: Path) -> int:
    from benchmarks import plots

    for file in plots.draw(results, folder):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
