"""A rank of a job that trains with a collective in each step: `preempted_job.py FOLDER STEPS OPTIONS`.

Rank r is r times slower than rank 1 outside of the collective. It logs what it does to `FOLDER/rank-R.log`.
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
from ckptengine.errors import Preempted
from ckptengine.storage.local import LocalStorage


def main() -> None:
    folder, steps, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    rank, life = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**what: object) -> None:
        os.write(log, json.dumps({"life": life, "pid": os.getpid(), **what}).encode() + b"\n")

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    slow, create = options.get("slow_write", 0.0), LocalStorage.create_archive

    def create_slowly(storage, name, nbytes, **options):
        time.sleep(slow)
        return create(storage, name, nbytes, **options)

    LocalStorage.create_archive = create_slowly
    # The whole state is one number that tells how far training came, in every element.
    weights, state = torch.zeros(1000), {"epoch": 0}
    state["weights"] = weights
    file = options.get("file")
    preemption = ce.Preemption(file=file, grace=options.get("grace"))
    try:
        with ce.Checkpointer(options["run"], every=options["every"], preemption=preemption, timeout=60) as ckpt:
            start = ckpt.restore(state) or 0
            assert (weights == start).all(), weights
            note(resumed=start, ranks=dist.get_world_size())
            for step in range(start + 1, steps + 1):
                note(began=step)
                time.sleep(options.get("pace", 0.02) * rank)
                one = torch.ones(1000) / dist.get_world_size()
                if not options.get("apart"):
                    dist.all_reduce(one)
                weights += one.round() if not options.get("apart") else 1
                handle = ckpt.step(step, state)
                note(did=step, saving=handle is not None)
    except Preempted as end:
        note(preempted=end.step, code=end.code)
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    note(ended=True)


main()
