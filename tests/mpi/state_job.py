"""Ranks that save numpy state and restore it at any number of ranks: `state_job.py FOLDER STEP`.

They restore the newest step, which must be STEP (0: none), go on for two steps, and write what they saw to
`FOLDER/rank-N.json`. MPI is initialized for one thread, and every call of it is noted with its thread.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "single"

import numpy as np  # noqa: E402
from ml_dtypes import bfloat16  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ckptengine as ce  # noqa: E402
from ckptengine.comm import mpi  # noqa: E402
from ckptengine.counters import counters  # noqa: E402
from ckptengine.errors import CheckpointError  # noqa: E402
from ckptengine.storage.disk import Disk  # noqa: E402

FIELD = (1013, 517)
REPLICA = 1 << 20
callers: set[str] = set()
writers: set[str] = set()


class Watched:
    """An MPI object, or its module, that notes which threads use it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        callers.add(threading.current_thread().name)
        found = getattr(self._inner, name)
        if isinstance(found, MPI.Intracomm):
            return Watched(found)
        if not callable(found) or isinstance(found, type):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            callers.add(threading.current_thread().name)
            result = found(*arguments, **named)
            return Watched(result) if isinstance(result, MPI.Request) else result

        return call


def watch() -> None:
    mpi.MPI = Watched(MPI)  # nothing else of the engine imports it
    write = Disk.write_memory

    def noted(*arguments: Any) -> None:
        writers.add(threading.current_thread().name)
        write(*arguments)

    Disk.write_memory = noted


def whole(step: int) -> np.ndarray:
    """Return the field of a step, every bit pattern of it different."""
    return np.arange(FIELD[0] * FIELD[1], dtype=np.float64).reshape(FIELD) / 7 + step


def block() -> tuple[slice, slice]:
    """Return this rank's block of the field, of a process grid that is as square as the number of ranks allows."""
    rows, columns = MPI.Compute_dims(MPI.COMM_WORLD.size, 2)
    row, column = divmod(MPI.COMM_WORLD.rank, columns)
    cut = [np.linspace(0, length, parts + 1).astype(int) for length, parts in zip(FIELD, (rows, columns), strict=True)]
    return slice(*map(int, cut[0][row : row + 2])), slice(*map(int, cut[1][column : column + 2]))


def state_of(step: int) -> dict[str, Any]:
    mine = block()
    return {
        "field": ce.ShardedArray(whole(step)[mine].copy(), FIELD, [part.start for part in mine]),
        "replica": (np.arange(REPLICA, dtype=np.uint32) + step).view(np.float32),
        "half": (np.arange(777) * 0.37 + step).astype(bfloat16),
        "values": {"step": step, "exact": 0.1 + step, "big": 2**70 + step, "words": ["a", b"\0\xff", None, (1, 2)]},
        "own": ce.PerRank(MPI.COMM_WORLD.rank + 100 * step, resize=lambda saved, rank, size: sum(saved)),
    }


def bits(state: dict[str, Any]) -> list[bytes]:
    return [array.tobytes() for array in (state["field"].local, state["replica"], state["half"])]


def said(handle: ce.SaveHandle) -> list[str]:
    try:
        handle.durable.result()
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    return ["saved", ""]


def failures(folder: Path, report: dict[str, Any]) -> None:
    """Saves that fail: a replica that differs, at the first save and at a later one, and a rank that is late."""
    world = MPI.COMM_WORLD
    with ce.Checkpointer(folder / "failing", timeout=30, max_failures=100) as checkpointer:
        try:
            checkpointer.save(1, {"cursor": int(world.rank == 2)})
        except CheckpointError as error:
            report["differing at first"] = [type(error).__name__, str(error)]
        report["agreeing"] = said(checkpointer.save(2, {"cursor": 2}))
        report["differing later"] = said(checkpointer.save(3, {"cursor": int(world.rank == 2)}))
        report["agreeing again"] = said(checkpointer.save(4, {"cursor": 4}))
    with ce.Checkpointer(folder / "late", timeout=4, max_failures=100) as checkpointer:
        said(checkpointer.save(1, {"cursor": 1}))
        world.Barrier()
        given_up = folder / "given up"
        deadline = time.monotonic() + 60
        while world.rank == 1 and not given_up.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        report["late"] = said(checkpointer.save(2, {"cursor": 2}))
        given_up.touch()
        world.Barrier()
        report["after late"] = said(checkpointer.save(3, {"cursor": 3}))


def main() -> None:
    folder, expected = Path(sys.argv[1]), int(sys.argv[2])
    report: dict[str, Any] = {"level": MPI.Query_thread()}
    watch()
    with ce.Checkpointer(folder / "run", every=1, timeout=60) as checkpointer:
        state = state_of(0)
        before = counters()
        step = checkpointer.restore(state) or 0
        report["read"] = (counters() - before).read_nbytes
        assert step == expected, step
        if step:
            reference = state_of(step)
            assert bits(state) == bits(reference)
            assert state["values"] == reference["values"]
            report["own"] = state["own"].value
        for step in (expected + 1, expected + 2):
            checkpointer.step(step, state_of(step))
    if expected == 0:
        failures(folder, report)
    report |= {"callers": sorted(callers), "writers": sorted(writers), "torch": "torch" in sys.modules}
    (folder / f"rank-{MPI.COMM_WORLD.rank}.json").write_text(json.dumps(report))


main()
