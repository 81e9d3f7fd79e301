"""A rank of a job whose only storage is a bucket: `job.py FOLDER URL save|load|train`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros

import ckptengine as ce
from ckptengine.storage import remote, upload
from ckptengine.storage.budget import Budget
from ckptengine.storage.open import open_storage

ROWS, COLUMNS = 1003, 517


def full() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)


def save(url: str) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        "rows": distribute_tensor(full(), mesh, [Shard(0)]),
        "columns": distribute_tensor(full() * 2, mesh, [Shard(1)]),
        "whole": distribute_tensor(full() * 3, mesh, [Replicate()]),
        "plain": torch.ones(100_000, dtype=torch.bfloat16),
        "step": 5,
    }
    stats = ce.save(url, state)
    return {"nbytes": stats.nbytes}


def load(url: str) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        # The other way round than they were saved.
        "rows": zeros(ROWS, COLUMNS, device_mesh=mesh, placements=[Shard(1)]),
        "columns": zeros(ROWS, COLUMNS, device_mesh=mesh, placements=[Shard(0)]),
        "whole": zeros(ROWS, COLUMNS, device_mesh=mesh, placements=[Replicate()]),
        "plain": torch.zeros(100_000, dtype=torch.bfloat16),
        "step": 0,
    }
    ce.load(url, into=state)
    for factor, name in enumerate(("rows", "columns", "whole"), 1):
        tensor = state[name]
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), full() * factor), name
    assert bool((state["plain"] == 1).all())
    return {"step": state["step"]}


def die(url: str, directory: str) -> None:
    """Have this process killed, once the attempt in a directory has the lease that another one writes."""
    storage = open_storage(url)
    while not any(storage.exists(f"{directory}/{name}/lease.json") for name in storage.list(directory)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def train(url: str) -> dict:
    """Save three steps; in the first life the last rank dies in the third one."""
    remote.Budget = lambda: Budget(part_nbytes=5 << 20)  # type: ignore[assignment, misc]
    state = {"w": torch.zeros(4_000_000)}  # two parts of each rank
    ckpt = ce.Checkpointer(url, every=1, keep_last=2, timeout=15, preemption=None)
    restored = ckpt.restore(state)
    first = restored or 0
    committed = []
    for step in range(first + 1, first + 4):
        state["w"].fill_(step)
        if restored is None and step == 3 and dist.get_rank() == dist.get_world_size() - 1:
            # Killed with its upload begun and its parts sent.
            upload.RemoteArchiveWriter.finish = lambda self: die(url, "step-00000003")
        handle = ckpt.step(step, state)
        assert handle is not None
        handle.durable.result()
        committed.append(step)
    ckpt.close()
    return {"restored": restored, "value": state["w"][0].item(), "committed": committed}


def main() -> None:
    folder, url, what = sys.argv[1:]
    dist.init_process_group("gloo")
    report = {"save": save, "load": load, "train": train}[what](url)
    (Path(folder) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
