"""A rank of a job under mpiexec whose run has tiers: `mpi_tiers_job.py FOLDER OPTIONS`, OPTIONS being JSON.

`local` and `memory` are the Checkpointer's, with `nodes` a folder for each rank below them; the run is `FOLDER/run`.
Restores, trains until step `until`, and writes to `FOLDER/rank-N.json` what it saw. A rank that waited for another in
vain would do so for longer than a test may take. `dies_at`: at that step the disk that saves go to takes no archive,
and once the step is in memory the job is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "single"

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import ckptengine as ce  # noqa: E402
from ckptengine.catalog.listing import newest  # noqa: E402
from ckptengine.storage.local import LocalStorage  # noqa: E402

ROWS = 400_000


def state_of(step: int) -> dict[str, Any]:
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    part = ROWS // size
    mine = (np.arange(rank * part, (rank + 1) * part, dtype=np.float64) * step).copy()
    return {"rows": ce.ShardedArray(mine, (ROWS,), (rank * part,)), "step": step}


def stuck(self: LocalStorage, name: str, nbytes: int, **more: Any) -> Any:
    time.sleep(600)


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = MPI.COMM_WORLD
    report: dict[str, Any] = {}
    local, memory = options["local"], options["memory"]
    if options.get("nodes"):
        local, memory = (f"{place}/node-{world.rank}" for place in (local, memory))
        Path(memory).mkdir(exist_ok=True)
    ckpt = ce.Checkpointer(folder / "run", every=1, local=local, memory=memory, timeout=1000, preemption=None)
    with ckpt:
        state = state_of(0)
        report["restored"] = ckpt.restore(state)
        if report["restored"]:
            expected = state_of(report["restored"])
            assert state["rows"].local.tobytes() == expected["rows"].local.tobytes()
            assert state["step"] == expected["step"]
        for step in range((report["restored"] or 0) + 1, options["until"] + 1):
            if step == options.get("dies_at"):
                LocalStorage.create_archive = stuck  # type: ignore[method-assign]
            handle = ckpt.step(step, state_of(step))
            assert handle is not None
            if step == options.get("dies_at"):
                tier = ckpt._tiers.places.memory
                assert tier is not None
                while (found := newest(tier.storage)) is None or found.step != step:
                    time.sleep(0.01)
                world.Barrier()
                os.kill(os.getpid(), signal.SIGKILL)
            handle.durable.result()
    report["uploaded"] = ckpt.uploaded
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(report))


main()
