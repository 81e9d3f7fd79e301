"""The MindSpore example, watched: what it restored, what it has after each step; and one rank killed where asked.

mpiexec ... mindspore_job.py LIFE RUN EPOCHS KILLED_STEP

Each rank appends to `LIFE/rank-N.jsonl`. After `KILLED_STEP` steps the last rank kills itself; 0 is never.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

from mpi4py import MPI

import ckptengine as ce
from ckptengine.comm.select import current

EXAMPLE = Path(__file__).parents[2] / "examples" / "mindspore_mpi.py"
LIFE, RUN, EPOCHS, KILLED_STEP = sys.argv[1:]
WORLD = MPI.COMM_WORLD


def digests(state):
    """Return a digest of each parameter of the network and the optimizer, and the position in the data."""
    parameters = [*state["network"].get_parameters(), *state["optimizer"].get_parameters()]
    found = {p.name: hashlib.sha256(p.asnumpy().tobytes()).hexdigest()[:16] for p in parameters}
    sampler = state["data"]
    return found | {"position": [sampler.epoch, sampler.consumed, sampler.global_batches]}


def tell(**what):
    with Path(LIFE, f"rank-{WORLD.rank}.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


class WatchedCheckpointer(ce.Checkpointer):
    def restore(self, state):
        step = super().restore(state)
        tell(communicator=type(current()).__name__, torch="torch" in sys.modules, restored=step, state=digests(state))
        return step

    def step(self, step, state):
        tell(step=step, state=digests(state))
        if step == int(KILLED_STEP) and WORLD.rank == WORLD.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(step, state)


if __name__ == "__main__":
    ce.Checkpointer = WatchedCheckpointer
    sys.argv = [str(EXAMPLE), RUN, EPOCHS]
    runpy.run_path(str(EXAMPLE), run_name="__main__")
