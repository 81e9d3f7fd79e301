"""Planning and layout at the scale of a large job, simulated in one process: `python -m benchmarks.scale`.

The ranks are those of `fully_shard` over all of them: each leaf is cut along its first dimension, so that each rank has
a chunk of each leaf. What one rank computes is measured as it is; what the others would send is made up beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.archive.layout_file import encode_layout
from ckptengine.archive.names import archive_name
from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.listing import committed, manifest_name, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.layout.merge import merge
from ckptengine.layout.rank_rows import PackedRows
from ckptengine.layout.read_plan import WantedPart, plan_read
from ckptengine.layout.survey import even_part
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.save.planner import Plan, Planner, Taken
from ckptengine.save.reading import Reading, structure_of
from ckptengine.save.values import stored_values
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part, Placement
from ckptengine.state.asked import Asked
from ckptengine.state.tree import flatten_traced
from ckptengine.storage.local import LocalStorage

TARGETS = {
    "layout_bytes_per_chunk": 4.0,
    "first_plan_seconds": 1.0,
    "later_plan_seconds": 0.0,
    "read_seconds": 1.0,
}

_LABELS = {
    "layout_bytes_per_chunk": "layout file, bytes per chunk",
    "first_plan_seconds": "a rank's first plan, s",
    "first_plan_bytes": "  bytes that it receives for it",
    "later_plan_seconds": "a rank's later plans, s",
    "merge_seconds": "merge on rank 0, s",
    "encode_seconds": "encoding of the layout file, s",
    "packed_bytes": "bytes that rank 0 keeps of all ranks' rows",
    "read_seconds": "manifest and layout for one rank's leaves, s",
    "manifest_seconds": "  of it the manifest",
    "layout_seconds": "  of it opening the layout",
    "places_seconds": "  of it finding the chunks",
    "peak_rss_gib": "peak memory of all of this, GiB",
}


class Crowd(Communicator):
    """All ranks at once: the others say what the one that runs says, as ranks with equal tables do."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.received = 0

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        self.received += len(value) * self.world_size
        return [value] * self.world_size

    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        raise NotImplementedError

    def barrier(self, timeout: float) -> None:
        raise NotImplementedError

    def store(self) -> KeyValueStore | None:
        return None


def shapes_of(ranks: int, leaves: int) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Yield paths and shapes of a model's leaves, of ten kinds as in a transformer, half of them one row short."""
    kinds = [(1, 64), (1,), (2, 16), (3, 8), (1, 32), (2,), (4, 4), (1, 48), (3,), (1, 16)]
    for number in range(leaves):
        (rows, *rest), name = kinds[number % 10], f"part{number % 10}.weight"
        first = rows * ranks - (rows > 1)
        yield ("model", f"layers.{number // 10}.{name}"), (first, *rest)


def reading_of(rank: int, ranks: int, leaves: int) -> Reading:
    """Return the state of one rank, in which no tensor has memory: nothing here looks at a byte."""
    arrays = []
    for path, shape in shapes_of(ranks, leaves):
        part = Part(_box(shape, rank, ranks), HostMemory(0, (0,) * len(shape), 0, 0, None))
        arrays.append(ArrayLeaf(path, "bfloat16", shape, Placement.SHARDED, (part,), "torch"))
    plain, trace = flatten_traced({"step": 1})
    flat = replace(plain, arrays=tuple(arrays))
    return Reading({}, plain, structure_of(flat), flat.arrays, None, trace, [], Asked(), {})


def plan_of(rank: int, ranks: int, leaves: int) -> Plan:
    """Return a rank's plan."""
    reading = reading_of(rank, ranks, leaves)
    planned = Planner(Crowd(rank, ranks)).plan(Taken(reading, stored_values(reading.plain)), 60.0)
    if isinstance(planned, Exception):
        raise planned
    return planned.plan


def all_rows(ranks: int, leaves: int) -> tuple[list[PackedRows], list[int]]:
    """Return what each rank would tell of its archive, and the sizes of the archives' fixed regions.

    Archives differ by the digits of their entries' names and by the last rank's shorter chunks, so one of each kind is
    planned and stands for the others.
    """
    packed, sizes = [], []
    kinds: dict[tuple[int, bool], tuple[Plan, PackedRows]] = {}
    for rank in range(ranks):
        kind = (len(str(rank)), rank == ranks - 1)
        if kind not in kinds:
            plan = plan_of(rank, ranks, leaves)
            kinds[kind] = plan, PackedRows.decode(plan.rows.encode())
        plan, first = kinds[kind]
        rows = replace(plan.rows, rank=rank, cells=np.full_like(plan.rows.cells, rank))
        packed.append(replace(first, rank=rank, columns=rows.columns()))
        sizes.append(plan.image.fixed_nbytes)
    return packed, sizes


def run(ranks: int, leaves: int) -> dict[str, Any]:
    """Return the figures of one simulation: sizes in bytes, `…_seconds` of this process's CPU, `…_wall` seconds."""
    result: dict[str, Any] = {"ranks": ranks, "leaves": leaves, "chunks": ranks * leaves}
    rank = ranks // 2
    reading = reading_of(rank, ranks, leaves)
    crowd = Crowd(rank, ranks)
    planner, taken = Planner(crowd), Taken(reading, stored_values(reading.plain))
    with timed(result, "first_plan"):
        planner.plan(taken, 60.0)
    result["first_plan_bytes"] = crowd.received
    with timed(result, "later_plan"):
        planner.plan(taken, 60.0)
    packed, sizes = all_rows(ranks, leaves)
    result["packed_bytes"] = sum(len(rows.columns) for rows in packed)
    with timed(result, "merge"):
        rows = merge(packed)
    with timed(result, "encode"):
        layout, record = encode_layout(rows)
    result["layout_bytes"] = len(layout)
    result["layout_bytes_per_chunk"] = len(layout) / rows.archive.size
    del rows, packed
    with tempfile.TemporaryDirectory(dir=".") as directory:
        _write(Path(directory), layout, record, sizes)
        _read(Path(directory), result)
    result["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def _write(directory: Path, layout: bytes, record: ArchiveRecord, sizes: list[int]) -> None:
    """Write a checkpoint of which only manifest and layout are there."""
    archives = tuple(ArchiveRecord(archive_name(rank), size + 4096, size, "0" * 64) for rank, size in enumerate(sizes))
    manifest = Manifest(None, 1, None, "simulated", len(sizes), BLOCK_NBYTES, archives, record)
    (directory / "data-simulated").mkdir()
    (directory / "data-simulated" / record.name).write_bytes(layout)
    (directory / manifest_name(1)).write_bytes(manifest.encode())


def _read(directory: Path, result: dict[str, Any]) -> None:
    """Measure in what time one rank finds where its part of each leaf lies."""
    storage, ranks, leaves = LocalStorage(directory), result["ranks"], result["leaves"]
    rank = ranks // 2
    boxes = {path: _box(shape, rank, ranks) for path, shape in shapes_of(ranks, leaves)}
    with timed(result, "manifest"):
        (entry,) = committed(storage)
        checkpoint = Checkpoint(storage, entry.directory, read_manifest(storage, entry))
    with timed(result, "layout"):
        rows = checkpoint.rows
        wanted = [WantedPart(rows.index[path, None], box) for path, box in boxes.items()]
    with timed(result, "places"):
        plan = plan_read(rows, wanted)
    assert {number: len(copies) for number, copies in plan.items()} == {rank: leaves}
    for kind in ("seconds", "wall"):
        result[f"read_{kind}"] = sum(result[f"{part}_{kind}"] for part in ("manifest", "layout", "places"))


@contextlib.contextmanager
def timed(result: dict[str, Any], name: str) -> Iterator[None]:
    """Note the seconds of CPU and of wall clock that the block takes: other work on the machine tells in the latter."""
    wall, seconds = time.perf_counter(), time.process_time()
    yield
    result[f"{name}_seconds"] = time.process_time() - seconds
    result[f"{name}_wall"] = time.perf_counter() - wall


def _box(shape: tuple[int, ...], rank: int, ranks: int) -> Box:
    start, length = even_part(shape[0], rank, ranks)
    return Box((start, *(0 for _ in shape[1:])), (length, *shape[1:]))


def table(result: dict[str, Any]) -> str:
    """Return the figures as a Markdown table, each beside its target."""
    scale = f"{result['ranks']:,} ranks × {result['leaves']:,} leaves, {result['chunks']:,} chunks"
    lines = [
        f"{scale}; seconds of CPU, and by the clock:",
        "",
        "| what | CPU | clock | target |",
        "|---|---|---|---|",
    ]
    for name, label in _LABELS.items():
        value, target = result[name], TARGETS.get(name)
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        wall = f"{result[name.replace('_seconds', '_wall')]:.3f}" if name.endswith("_seconds") else ""
        aim = "" if target is None else f"≤ {target:g}" if target else "0"
        lines.append(f"| {label} | {shown} | {wall} | {aim} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=16_384)
    parser.add_argument("--leaves", type=int, default=2_000)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    result = run(options.ranks, options.leaves)
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
