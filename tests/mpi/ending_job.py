"""Ranks under mpiexec that end right after they have begun a save: `ending_job.py RUN`."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "single"

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ckptengine as ce  # noqa: E402
from ckptengine.storage.disk import Disk  # noqa: E402

logging.basicConfig(level=logging.WARNING, format="ckptengine: %(message)s")
write = Disk.write_memory


def slow(*arguments: Any) -> None:
    time.sleep(0.5 + MPI.COMM_WORLD.rank)
    write(*arguments)


Disk.write_memory = slow  # type: ignore[method-assign]
rows = np.full((8, 1000), float(MPI.COMM_WORLD.rank))
ckpt = ce.Checkpointer(sys.argv[1])
ckpt.save(1, {"rows": ce.ShardedArray(rows, (8 * MPI.COMM_WORLD.size, 1000), (8 * MPI.COMM_WORLD.rank, 0))})
