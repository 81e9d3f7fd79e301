"""A rank of a job that trains for a planned number of epochs: `epochs_job.py FOLDER EPOCHS OPTIONS`.

Each epoch has 12 batches of 8 samples, which the ranks share, however many they are.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import ckptengine as ce

BATCHES, SAMPLES = 12, 8


def main() -> None:
    folder, epochs, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**what: object) -> None:
        os.write(log, json.dumps({"pid": os.getpid(), "life": 0, "ranks": ranks, **what}).encode() + b"\n")

    counts = torch.zeros(BATCHES * SAMPLES)  # how often each sample was trained on
    state = {"counts": counts, "epoch": 0, "batch": 0}
    with ce.Checkpointer(options["run"], every=5, timeout=60) as ckpt:
        note(resumed=ckpt.restore(state))
        while state["epoch"] < epochs:
            epoch, batch = state["epoch"], state["batch"]
            time.sleep(options["pace"])
            used = torch.zeros_like(counts)
            used[batch * SAMPLES : (batch + 1) * SAMPLES][rank::ranks] = 1
            dist.all_reduce(used)
            counts += used
            # What comes next is a part of the state: saved after this step, it says where the next life begins.
            state["epoch"], state["batch"] = (epoch, batch + 1) if batch + 1 < BATCHES else (epoch + 1, 0)
            step = epoch * BATCHES + batch + 1
            ckpt.step(step, state)
            note(did=step)
    dist.destroy_process_group()  # as docs/torchrun.md tells: else torch may abort a job that is done
    note(ended=counts.tolist())


main()
