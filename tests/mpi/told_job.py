"""A job that is told to end while a rank waits for the others and holds the interpreter's lock: `told_job.py FOLDER
WHO TOLD`.

Rank WHO does so after step 3, until the others have gone past step 4; rank TOLD gets the signal meanwhile.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import mpi4py

mpi4py.rc.thread_level = "single"

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ckptengine as ce  # noqa: E402

WORLD = MPI.COMM_WORLD
FOLDER, WHO, TOLD = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def between(step: int, pipe: int) -> None:
    """Do what follows a step."""
    if step == 3 and WORLD.rank == WHO:
        (FOLDER / "held").touch()
        byte = ctypes.create_string_buffer(1)
        for _ in range(WORLD.size - 1):
            ctypes.PyDLL(None).read(pipe, byte, 1)
    elif step == 3:
        while not (FOLDER / "held").exists():
            time.sleep(0.01)
        if WORLD.rank == TOLD:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)  # all that can have told how far they are
    elif step == 4 and WORLD.rank != WHO:
        os.write(pipe, b".")
    elif step > 4:
        WORLD.Barrier()


def main() -> None:
    if WORLD.rank == 0:
        os.mkfifo(FOLDER / "pipe")
    WORLD.Barrier()
    pipe = os.open(FOLDER / "pipe", os.O_RDWR)
    state = {"rows": ce.ShardedArray(np.full(10, 1.0), (10 * WORLD.size,), (10 * WORLD.rank,))}
    ended = None
    try:
        with ce.Checkpointer(FOLDER / "run", timeout=60) as checkpointer:
            for step in itertools.count(1):
                checkpointer.step(step, state)
                between(step, pipe)
                time.sleep(0.02)
    except ce.errors.Preempted as end:
        ended = end.step
    (FOLDER / f"rank-{WORLD.rank}.json").write_text(json.dumps({"ended": ended}))


main()
