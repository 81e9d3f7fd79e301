"""Ranks of which one leaves the second save out: `left_out_job.py FOLDER SKIPPER`."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist

import ckptengine as ce
from ckptengine.errors import CheckpointError

folder, skipper = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
ends = {}
with ce.Checkpointer(folder / "run", timeout=100, max_failures=9) as ckpt:
    for step in range(1, 6):
        state = {"w": np.full(1000, float(step)), "mine": ce.PerRank({"rank": rank}), "step": step}
        if step != 2 or rank != skipper:
            began, handle = time.monotonic(), ckpt.save(step, state)
            if step != 2:
                handle.durable.result(100)
                ends[step] = ["", time.monotonic() - began]
            else:
                left = handle
        while step == 2 and not list((folder / "run").glob("step-00000002/data-*")):
            time.sleep(0.01)  # a thread of the others tells where they are
        dist.barrier()  # as the next step of the training would be
    if rank != skipper:
        try:
            left.durable.result(0)
        except CheckpointError as error:
            ends[2] = [str(error), 0.0]
(folder / f"{rank}.json").write_text(json.dumps(ends))
dist.destroy_process_group()
