"""Ranks that die: `kill_job.py FOLDER die | leader | restart | raise`.

`die`: four ranks save step 1; rank 2 gets SIGKILL in the middle of writing step 2. Where the launcher leaves the others
alive they write what they saw to `FOLDER/rank-N.json`; then rank 3 dies within an operation of those that are left.
`leader`: the same with rank 0, which hosts the store by which they coordinate.
`restart`: restore each run in `FOLDER/*/run` and save on. `raise`: rank 1 ends with an error of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "single"

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ckptengine as ce  # noqa: E402
from ckptengine.comm.base import KeyValueStore  # noqa: E402
from ckptengine.comm.exchange import StoreCommunicator  # noqa: E402
from ckptengine.comm.mpi import from_mpi  # noqa: E402
from ckptengine.errors import CheckpointError  # noqa: E402
from ckptengine.storage.disk import Disk  # noqa: E402

TIMEOUT = 5.0
ROWS = 240_000  # divided by the numbers of ranks that are used


def state_of(step: int) -> dict[str, Any]:
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    part = ROWS // size
    whole = np.arange(ROWS, dtype=np.float64) * step
    mine = whole[rank * part : (rank + 1) * part].copy()
    return {"rows": ce.ShardedArray(mine, (ROWS,), (rank * part,)), "step": step}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def said(operation: Callable[[], Any]) -> list[Any]:
    """Return the class, the message and the seconds of what an operation raises."""
    began = time.monotonic()
    try:
        operation()
    except CheckpointError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["returned", "", time.monotonic() - began]


class DiesInside(KeyValueStore):
    """A store at whose next value the rank dies: it has come to the operation, and has told nothing."""

    def __init__(self, inner: KeyValueStore) -> None:
        self._inner = inner

    def set(self, key: str, value: bytes) -> None:
        die()

    def get(self, key: str, timeout: float) -> bytes | None:
        return self._inner.get(key, timeout)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def claim(self, key: str, value: bytes) -> bytes:
        return self._inner.claim(key, value)


def die_writing() -> None:
    """Have this rank die when it has written a part of its next archive."""
    write = Disk.write_memory

    def write_some(disk: Disk, fd: int, address: int, nbytes: int, position: int) -> None:
        write(disk, fd, address, 4096, position)
        die()

    Disk.write_memory = write_some  # type: ignore[method-assign]


def ranks_that_die(folder: Path) -> None:
    world = MPI.COMM_WORLD
    rest = from_mpi(world.Split(int(world.rank == 2), world.rank), timeout=60)
    checkpointer = ce.Checkpointer(folder / "run", timeout=TIMEOUT, max_failures=100)
    checkpointer.save(1, state_of(1)).durable.result()
    if world.rank == 2:
        die_writing()
    report = {"save": said(lambda: checkpointer.save(2, state_of(2)).durable.result())}
    report["next meeting"] = said(lambda: from_mpi().barrier(2.0))
    if world.rank == 3:
        assert isinstance(rest, StoreCommunicator)
        rest._store = DiesInside(rest._store)
    report["within"] = said(lambda: rest.all_gather(b"x", 3.0))
    report["afterwards"] = said(lambda: rest.all_gather(b"x", 3.0))
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(report))
    deadline = time.monotonic() + 60  # MPI_Finalize would wait for the dead: rank 0 goes when the other one has
    while world.rank == 0 and not (folder / "rank-1.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)


def leader_that_dies(folder: Path) -> None:
    world = MPI.COMM_WORLD
    checkpointer = ce.Checkpointer(folder / "run", timeout=60, max_failures=100)
    checkpointer.save(1, state_of(1)).durable.result()
    if world.rank == 0:
        die_writing()
    report = {"save": said(lambda: checkpointer.save(2, state_of(2)).durable.result())}
    report["next save"] = said(lambda: checkpointer.save(3, state_of(3)).durable.result())
    report["next meeting"] = said(lambda: from_mpi().barrier(60))
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(report))
    os._exit(0)


def restart(folder: Path) -> None:
    for run in sorted(folder.glob("*/run")):
        with ce.Checkpointer(run, timeout=60) as checkpointer:
            state = state_of(0)
            assert checkpointer.restore(state) == 1, run
            expected = state_of(1)
            assert state["rows"].local.tobytes() == expected["rows"].local.tobytes()
            assert state["step"] == 1
            checkpointer.save(2, state_of(2)).durable.result()


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "die":
        ranks_that_die(folder)
    elif mode == "leader":
        leader_that_dies(folder)
    elif mode == "restart":
        restart(folder)
    else:
        if MPI.COMM_WORLD.rank == 1:
            raise RuntimeError("the input of rank 1 is missing")
        ce.Checkpointer(folder / "run")


main()
