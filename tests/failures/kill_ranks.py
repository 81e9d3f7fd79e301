"""Two ranks under gloo of which things go wrong: `kill_ranks.py FOLDER VICTIM`.

This process forks, for each job, an agent that holds the job's store, as torchrun's does, and two ranks. Each rank
writes what it has seen to `FOLDER/job-J-rank-R.json`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from kill_runs import forked, wait_for

import ckptengine as ce
from ckptengine.catalog import receipt
from ckptengine.errors import CheckpointError
from ckptengine.snapshot import arena
from ckptengine.storage.disk import Disk

TIMEOUT = 5.0
ROWS = 3000


def state_of(rank: int, step: int) -> dict[str, Any]:
    """Return a rank's part of the state of a step: halves of one array, a replica, and something of its own."""
    whole = np.arange(2 * ROWS, dtype=np.float32) * step
    return {
        "half": ce.ShardedArray(whole[rank * ROWS : (rank + 1) * ROWS].copy(), (2 * ROWS,), (rank * ROWS,)),
        "replica": np.full(300_000, step, np.int32),
        "own": ce.PerRank({"rank": rank, "step": step}),
        "step": step,
    }


def holds(state: dict[str, Any], rank: int, step: int) -> bool:
    """Whether a state is that of a step."""
    expected = state_of(rank, step)
    return (
        np.array_equal(state["half"].local, expected["half"].local)
        and np.array_equal(state["replica"], expected["replica"])
        and state["own"].value == expected["own"].value
        and state["step"] == step
    )


def saved(checkpointer: ce.Checkpointer, rank: int, step: int) -> dict[str, Any]:
    """Save a step; return how that ended and how long it took."""
    began = time.monotonic()
    text = kind = ""
    try:
        checkpointer.save(step, state_of(rank, step)).durable.result()
    except CheckpointError as error:
        text, kind = str(error), type(error).__name__
    return {"step": step, "kind": kind, "text": text, "seconds": time.monotonic() - began}


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def first_job(run: Path, rank: int, victim: int) -> list[dict[str, Any]]:
    """Saves that fail on the victim in several ways, each followed by one that succeeds; then it dies in one."""
    said = []
    checkpointer = ce.Checkpointer(run, timeout=TIMEOUT, max_failures=100)
    available, write = arena.available_nbytes, Disk.write_memory
    # No memory at the very first save, on one rank only: the plans exist already.
    if rank == victim:
        arena.available_nbytes = lambda: 0
    said.append(saved(checkpointer, rank, 1))
    arena.available_nbytes = available
    said.append(saved(checkpointer, rank, 2))
    if rank == victim:
        Disk.write_memory = failing(errno.EIO)
    said.append(saved(checkpointer, rank, 3))
    Disk.write_memory = write
    said.append(saved(checkpointer, rank, 4))
    if rank == victim:

        def die(disk: Disk, fd: int, address: int, nbytes: int, position: int) -> None:
            write(disk, fd, address, 4096, position)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        Disk.write_memory = die
    said.append(saved(checkpointer, rank, 5))
    return said


def second_job(run: Path, rank: int, victim: int) -> list[dict[str, Any]]:
    """Start again, restore, save."""
    with ce.Checkpointer(run, timeout=60) as checkpointer:
        state = state_of(rank, 0)
        step = checkpointer.restore(state)
        assert step == 4, step
        assert holds(state, rank, 4)
        return [{"restored": step}, saved(checkpointer, rank, 5)]


def main() -> None:
    folder, victim = Path(sys.argv[1]), int(sys.argv[2])
    parent = os.getpid()
    if victim == 0:
        receipt._GRACE = 2.0  # how much longer than its timeout a rank waits for the word of rank 0
    for number, job in enumerate((first_job, second_job)):
        port_file = folder / f"port-{number}"

        def agent(port_file: Path = port_file) -> None:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port_file.with_suffix(".part").write_text(str(store.port))
            port_file.with_suffix(".part").rename(port_file)
            while os.getppid() == parent:
                time.sleep(0.05)

        def rank_of(rank: int, number: int = number, job: Any = job, port_file: Path = port_file) -> None:
            port = int(port_file.read_text())
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            said = job(folder / "run", rank, victim)
            (folder / f"job-{number}-rank-{rank}.json").write_text(json.dumps(said))

        holder = forked(agent)
        while not port_file.exists():
            time.sleep(0.01)
        ranks = [forked(lambda rank=rank: rank_of(rank)) for rank in range(2)]
        for rank, process in enumerate(ranks):
            if number == 0 and rank == victim:
                _, status = os.waitpid(process, 0)
                assert os.WIFSIGNALED(status), status
            else:
                wait_for(process)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        if number == 0:
            left = [path.name for path in (folder / "run").glob("step-00000005/data-*")]
            (folder / "left.json").write_text(json.dumps(left))


if __name__ == "__main__":
    main()
