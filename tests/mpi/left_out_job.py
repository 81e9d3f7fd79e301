"""Ranks under mpiexec of which one leaves the second save out: `left_out_job.py FOLDER SKIPPER`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "single"

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ckptengine as ce  # noqa: E402
from ckptengine.errors import CheckpointError  # noqa: E402

folder, skipper = Path(sys.argv[1]), int(sys.argv[2])
world = MPI.COMM_WORLD
ends: dict[str, Any] = {"level": MPI.Query_thread()}
with ce.Checkpointer(folder / "run", timeout=100, max_failures=9) as ckpt:
    for step in range(1, 6):
        state = {"w": np.full(1000, float(step)), "mine": ce.PerRank({"rank": world.rank}), "step": step}
        if step != 2 or world.rank != skipper:
            began, handle = time.monotonic(), ckpt.save(step, state)
            if step != 2:
                handle.durable.result(100)
                ends[str(step)] = ["", time.monotonic() - began]
            else:
                left = handle
        while step == 2 and not list((folder / "run").glob("step-00000002/data-*")):
            time.sleep(0.01)  # a thread of the others tells where they are
        world.Barrier()  # as the next step of the job would be
    if world.rank != skipper:
        try:
            left.durable.result(0)
        except CheckpointError as error:
            ends["2"] = [str(error), 0.0]
    assert not list((folder / "run").rglob("message-*"))
    world.Barrier()
(folder / f"rank-{world.rank}.json").write_text(json.dumps(ends))
