"""One life of a training on a mesh, of a GPT or a mixture of experts: `mesh_life_job.py FOLDER LIFE SPLIT LAST KILLED`.

The ranks restore what earlier lives (LIFE is their number) have left, and train to the step LAST; at the step KILLED,
if there is one, the last rank kills itself. `FOLDER/life-LIFE-RANK.json` gets the losses, and digests of what there was
after the load and at the last save.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mesh_gpt import Life, Split
from mesh_moe import MoELife

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.load.loader import LoadOptions, load_newest
from ckptengine.storage.open import open_storage

EVERY = 2


def digests(life: Life | MoELife) -> dict[str, str]:
    return {name: hashlib.sha256(one.contiguous().numpy()).hexdigest() for name, one in life.wholes().items()}


def read_per_needed(run: Path, state: dict[str, Any]) -> float:
    """Load the newest checkpoint, and return how much was read of how much is needed."""
    loaded = load_newest(open_storage(run), state, current(), 60, LoadOptions())
    read = torch.tensor(loaded.counts.read)
    dist.all_reduce(read)
    return int(read) / loaded.counts.node_needed


def main(folder: Path, number: int, split: Split, last: int, killed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    life = MoELife(split, number) if split.experts_as else Life(split, number)  # nothing is right that was not restored
    found: dict[str, Any] = {"losses": {}}
    with ce.Checkpointer(folder / "run", every=EVERY, keep_last=2, timeout=60) as ckpt:
        if number:
            found["read"] = read_per_needed(folder / "run", life.state)
            found["loaded"] = digests(life)
        found["start"] = ckpt.restore(life.state)
        for step in range((found["start"] or 0) + 1, last + 1):
            found["losses"][step] = life.train(step)
            if ckpt.step(step, life.state) is not None:
                found["saved"] = {step: digests(life)}
            (folder / f"life-{number}-{dist.get_rank()}.json").write_text(json.dumps(found))
            if step == killed:
                ckpt.wait()
                dist.barrier()
                if dist.get_rank() == dist.get_world_size() - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()  # a rank that ends would be found before the one that was killed
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Split.of(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
