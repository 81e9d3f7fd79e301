"""One life of a job that reads JSON lines by ElasticBatches: torchrun ... stream_job.py FOLDER LIFE [RANK STEP].

Each rank writes what it was given in which step to FOLDER/life-LIFE-rank-R.jsonl. Rank RANK kills itself in the middle
of step STEP: after the batch was handed out, before the step is over.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed as dist

import ckptengine as ce
from ckptengine.data.readers import JsonLines

EPOCHS, GLOBAL_BATCH = 2, 24


def main() -> None:
    folder, life = Path(sys.argv[1]), sys.argv[2]
    victim, last_step = (int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 3 else (-1, 0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    shards = sorted((folder / "data").iterdir())
    data = ce.ElasticBatches(shards, GLOBAL_BATCH, open=JsonLines(), seed=4, block=2 * GLOBAL_BATCH)
    torch.manual_seed(0)  # replicas are compared
    model = torch.nn.Linear(64, 64)
    loader = data.loader(num_workers=2, prefetch_factor=3)
    state = {"model": model, "data": data}
    with (
        (folder / f"life-{life}-rank-{rank}.jsonl").open("w", buffering=1) as log,
        ce.Checkpointer(folder / "run", every=4, timeout=60) as ckpt,
    ):
        start = ckpt.restore(state) or 0
        while data.epoch < EPOCHS:
            epoch = data.epoch
            for records in data.batches(loader):
                step = data.global_batches
                log.write(json.dumps({"step": step, "epoch": epoch, "start": start, "ids": records}) + "\n")
                if rank == victim and step == last_step:
                    os.kill(os.getpid(), signal.SIGKILL)
                with torch.no_grad():
                    model.weight += 1
                dist.barrier()
                ckpt.step(step, state)
        ckpt.save(data.global_batches, state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
