"""One life of a training of experts: `expert_life_job.py FOLDER KIND REPLICAS EXPERTS LAST KILLED`.

The ranks form a mesh of replicas × experts, restore what there is, and train to the step LAST; at the step KILLED, if
there is one, the last rank kills itself. Each rank notes the losses of its steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from expert_job import Life

import ckptengine as ce


def main(folder: Path, kind: str, shape: tuple[int, int], last: int, killed: int) -> None:
    dist.init_process_group("gloo")
    life = Life(kind, shape, filled=True)
    state = life.state
    with ce.Checkpointer(folder / "run", every=2, keep_last=2) as ckpt:
        start = ckpt.restore(state)
        wrong = [] if start is None else life.wrong(folder / "run")
        dist.barrier()  # nobody saves a newer one while others compare
        losses = {}
        for step in range((start or 0) + 1, last + 1):
            (losses[step],) = life.train(range(step, step + 1))
            handle = ckpt.step(step, state)
            if step == killed - 1 and handle is not None:
                handle.durable.result()
            if step == killed and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
    found = {"start": start, "losses": losses, "wrong": wrong}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], (int(sys.argv[3]), int(sys.argv[4])), int(sys.argv[5]), int(sys.argv[6]))
