"""`peers`: one state of GPT-2 small's shape, saved and loaded by the limit, ckptengine and the peers in turn.

The page cache is dropped before each load, and every loaded value is compared. Before each save the checkpoint before
is removed and the disk comes to rest, so that all systems write new files under equal conditions.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from benchmarks.disk import count_files, drop_cache, remove, require_room
from benchmarks.options import Options
from benchmarks.rounds import best_of, interleaved, median_ratio, spread
from benchmarks.state import State, gpt2_small, nbytes
from benchmarks.systems import (
    SYSTEMS,
    CkptEngine,
    CkptEngineAsDcp,
    DcpAsyncCached,
    Limit,
    TorchCheckpointing,
    use_all_cores,
)
from benchmarks.table import Target, show_table, show_targets

MEASURES = ("stall", "durable", "load")


@dataclass(frozen=True, slots=True)
class Measured:
    """One system in one round: seconds, and the files of its checkpoint."""

    stall: float
    durable: float
    load: float
    files: int


def run(options: Options) -> dict[str, Any]:
    """Return all seconds, by system and measure, each list having one entry for each round."""
    use_all_cores()
    state = gpt2_small(options.scale)
    require_room(options.folder, 12 * nbytes(state))
    expected = {name: tensor.clone() for name, tensor in state.items()}
    systems: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for kind in SYSTEMS:
        if kind in (Limit, CkptEngine) or options.wants(kind.name):
            try:
                systems[kind.name] = kind(options.folder, state)
            except Exception as error:
                errors[kind.name] = f"{type(error).__name__}: {error}"
    try:
        subjects = {name: _subject(system, state, expected) for name, system in systems.items()}
        rounds, failed = interleaved(subjects, options.rounds(5))
    finally:
        for system in systems.values():
            system.close()
    for name in failed:
        remove(systems[name].path)
    result: dict[str, Any] = {
        "nbytes": nbytes(state),
        "tensors": len(state),
        "limit_copies_with": systems[Limit.name].copier.way,
        "systems": {
            name: {
                **{measure: [getattr(one, measure) for one in rounds[name]] for measure in MEASURES},
                "files": rounds[name][-1].files,
                "syncs": systems[name].syncs,
            }
            for name in rounds
        },
        "errors": errors | failed,
    }
    if CkptEngine.name in rounds:
        result["last_save"] = stats_of(systems[CkptEngine.name].stats)
    result["targets"] = [target.as_json() for target in targets(result["systems"])]
    return result


def _subject(system: Any, state: State, expected: State) -> Callable[[], Measured]:
    def measure() -> Measured:
        try:
            return measured(system, state, expected)
        finally:
            remove(system.path)
            for name, tensor in expected.items():
                state[name].copy_(tensor)  # also after a failure, for the systems that follow

    return measure


def measured(system: Any, state: State, expected: State) -> Measured:
    """Save and load once; raise `AssertionError` where a value came back changed."""
    stall, durable = system.save(state)
    drop_cache(system.path)
    for tensor in state.values():
        tensor.zero_()
    began = time.perf_counter()
    system.load(state)
    load = time.perf_counter() - began
    files = count_files(system.path)
    changed = [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)]
    if changed:
        raise AssertionError(f"{len(changed)} tensors came back changed, the first is {changed[0]}")
    return Measured(stall, durable, load, files)


def stats_of(stats: Any) -> dict[str, Any]:
    """Return what a save of ckptengine reported of itself, as plain values in seconds and bytes."""
    plain = asdict(stats)
    plain.pop("path")
    return plain


def targets(systems: dict[str, Any]) -> list[Target]:
    """Return what is promised of one process, against the limit and the peers that were measured."""
    if CkptEngine.name not in systems or Limit.name not in systems:
        return []
    ours, limit = systems[CkptEngine.name], systems[Limit.name]
    own = (CkptEngine.name, CkptEngineAsDcp.name, Limit.name)
    peers = {name: one for name, one in systems.items() if name not in own}
    found = [
        Target("stall, against a memcpy of the same bytes", median_ratio(ours["stall"], limit["stall"]), 1.1),
        Target("durable rate, against the limit's", median_ratio(limit["durable"], ours["durable"]), 0.95, "×", False),
        Target("cold load rate, against the limit's", median_ratio(limit["load"], ours["load"]), 0.95, "×", False),
    ]
    durable = [peers[kind.name]["durable"] for kind in (TorchCheckpointing, DcpAsyncCached) if kind.name in peers]
    best = median_ratio(best_of(durable), ours["durable"]) if durable else None
    found.append(
        Target("durable, times as fast as the better of torch_checkpointing and DCP async", best, 2, "×", False)
    )
    loads = [one["load"] for one in peers.values()]
    best = median_ratio(best_of(loads), ours["load"]) if loads else None
    found.append(Target("cold load, times as fast as the fastest peer", best, 1.5, "×", False))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    systems = result["systems"]
    limit = systems.get(Limit.name)
    rows = []
    for name, one in systems.items():
        cells = []
        for measure in MEASURES:
            relative = f"  {median_ratio(one[measure], limit[measure]):.2f}×" if limit else ""
            cells.append(spread(one[measure]).text() + relative)
        rows.append((name, *cells, str(one["files"])))
    rows += [(name, "failed", error, "", "") for name, error in result["errors"].items()]
    syncs = "".join(f"\n  {name}: {one['syncs']}" for name, one in systems.items())
    size = f"{result['nbytes'] / 1e9:.2f} GB in {result['tensors']} tensors"
    show_table(
        console,
        f"peers: {size}; seconds, median (least–most), and the median ratio to the limit's",
        ("system", "stall", "durable", "cold load", "files"),
        rows,
        f"The limit copies with {result['limit_copies_with']}. Durable includes{syncs}",
    )
    show_targets(console, (Target.of(one) for one in result["targets"]), "peers: targets")
