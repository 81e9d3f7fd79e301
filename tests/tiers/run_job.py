"""A rank of a job that saves three steps: `run_job.py FOLDER RUN`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import ckptengine as ce


def main() -> None:
    folder, run = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    state = {"shared": torch.zeros(50_000), "own": ce.PerRank({"w": np.zeros(400_000)}), "step": 0}
    with ce.Checkpointer(run, every=10, preemption=None) as ckpt:
        ckpt.restore(state)
        for step in (10, 20, 30):
            state["shared"].fill_(step)
            state["own"].value["w"][:] = np.random.default_rng([rank, step]).standard_normal(400_000)
            state["step"] = step
            ckpt.step(step, state)
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps({}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
