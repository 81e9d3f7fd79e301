"""A rank that comes back from a call and holds the interpreter's lock until the others are back: `held_job.py FOLDER`.

Each rank in turn does so after each kind of call. Whoever needs a word of it gets none: such a call ends with an error
of its timeout, and the job with it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import mpi4py

mpi4py.rc.thread_level = "single"

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ckptengine as ce  # noqa: E402
from ckptengine.errors import CheckpointError  # noqa: E402

TIMEOUT = 120.0
WORLD = MPI.COMM_WORLD
FOLDER = Path(sys.argv[1])
KEEPS_THE_LOCK = ctypes.PyDLL(None)


class Pipes:
    """A pipe to each rank, which that rank reads with the interpreter's lock held."""

    def __init__(self) -> None:
        if WORLD.rank == 0:
            for rank in range(WORLD.size):
                os.mkfifo(FOLDER / f"pipe-{rank}")
        WORLD.Barrier()
        self._own = os.open(FOLDER / f"pipe-{WORLD.rank}", os.O_RDWR)
        self._to = [os.open(FOLDER / f"pipe-{rank}", os.O_RDWR) for rank in range(WORLD.size)]

    def hold(self, who: int) -> None:
        """Hold the lock on one rank until all others have come here; they came here from the same call."""
        if WORLD.rank == who:
            byte = ctypes.create_string_buffer(1)
            for _ in range(WORLD.size - 1):
                KEEPS_THE_LOCK.read(self._own, byte, 1)
        else:
            os.write(self._to[who], b".")
        WORLD.Barrier()


def calls_of_a_run(pipes: Pipes, who: int) -> None:
    state = {
        "rows": ce.ShardedArray(np.full(1000, float(WORLD.rank)), (1000 * WORLD.size,), (1000 * WORLD.rank,)),
        "own": ce.PerRank({"rank": WORLD.rank}),
        "weights": np.arange(1000.0),
    }
    checkpointer = ce.Checkpointer(FOLDER / f"run-{who}", every=2, keep_last=2, timeout=TIMEOUT)
    pipes.hold(who)
    checkpointer.restore(state)
    pipes.hold(who)
    for step in range(1, 6):
        if WORLD.rank != who:
            time.sleep(0.05)  # the one that holds the lock is back long before
        checkpointer.step(step, state)
        pipes.hold(who)
    checkpointer.save(6, state)
    pipes.hold(who)
    checkpointer.wait()
    pipes.hold(who)
    checkpointer.save(7, state).durable.result()
    pipes.hold(who)
    state["new"] = np.ones(10)
    checkpointer.save(8, state)
    pipes.hold(who)
    checkpointer.flush()
    pipes.hold(who)
    checkpointer.restore(state)
    pipes.hold(who)
    checkpointer.save(9, state).durable.result()
    a_save_that_fails(checkpointer, pipes, who, state)
    checkpointer.save(11, state)
    checkpointer.close()
    pipes.hold(who)
    with ce.Checkpointer(FOLDER / f"run-{who}", timeout=TIMEOUT) as checkpointer:
        checkpointer.restore(state)
        checkpointer.save(12, state)
    pipes.hold(who)


def a_save_that_fails(checkpointer: ce.Checkpointer, pipes: Pipes, who: int, state: dict[str, object]) -> None:
    """Have one rank fail in a save that the others have begun: they hear of it, and it is back before them."""
    broken = {**state, "own": ce.PerRank({"rank": object()})} if WORLD.rank == who else state
    said = ""
    try:
        checkpointer.save(10, broken).durable.result()
    except CheckpointError as error:
        said = str(error)
    assert "own.rank: object can't be saved" in said, said
    pipes.hold(who)


def calls_of_one_checkpoint(pipes: Pipes, who: int) -> None:
    state = {"weights": np.arange(1000.0), "own": ce.PerRank({"rank": WORLD.rank})}
    path = FOLDER / f"one-{who}"
    ce.save(path, state, timeout=TIMEOUT)
    pipes.hold(who)
    handle = ce.async_save(path, state, timeout=TIMEOUT)
    pipes.hold(who)
    handle.durable.result()
    pipes.hold(who)
    ce.load(path, into=state, timeout=TIMEOUT)
    pipes.hold(who)


def main() -> None:
    sys.setswitchinterval(1.0)  # a thread of its own gets little done before the lock is held
    pipes = Pipes()
    for who in range(WORLD.size):
        calls_of_a_run(pipes, who)
        calls_of_one_checkpoint(pipes, who)
    (FOLDER / f"rank-{WORLD.rank}.json").write_text("{}")


main()
