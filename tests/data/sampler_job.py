"""A job that trains on sample numbers and notes each list that training is handed; it kills itself where told to.

Usage: sampler_job.py FOLDER EPOCHS KILL_AT WORKERS GLOBAL_BATCH MICRO_BATCH LAST. KILL_AT is the global batch after
which all ranks die by SIGKILL, 0 for never. Each life writes `life-<number>-<rank>.txt`: the step it starts from, then
a line of step, epoch and samples for each list. A first life with micro-batches tries to save after the
first one, and writes what that raises to `refused-<rank>.txt`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import ckptengine as ce

LENGTH = 75


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> int:
        return index


def try_to_save(ckpt: ce.Checkpointer, state: dict[str, Any]) -> str:
    try:
        ckpt.save(1, state).durable.result()
    except ce.errors.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def main() -> None:
    folder, epochs, kill_at, workers = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    batch, micro = int(sys.argv[5]), int(sys.argv[6]) or None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    sampler = ce.ElasticSampler(LENGTH, batch, seed=9, micro_batch=micro, last=sys.argv[7])  # type: ignore[arg-type]
    options = {"prefetch_factor": 3, "persistent_workers": True} if workers else {}
    loader = DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers, **options)
    total = torch.zeros(1, dtype=torch.int64)
    state = {"total": ce.PerRank(total, resize=lambda saved, r, n: saved[0] * 0), "data": sampler}
    # A save is durable before training goes on, so that what a killed job comes back to is known.
    with ce.Checkpointer(folder / "run", every=None, timeout=60) as ckpt:
        start = ckpt.restore(state) or 0
        assert start == sampler.global_batches
        life = len(list(folder.glob(f"life-*-{rank}.txt")))
        with (folder / f"life-{life}-{rank}.txt").open("w") as log:
            log.write(f"{start}\n")
            refused = ""
            for epoch in range(sampler.epoch, epochs):
                for samples in sampler.batches(loader):
                    total += samples.sum()
                    step = sampler.global_batches + (not sampler.complete)
                    print(step, epoch, *samples.tolist(), file=log, flush=True)
                    if micro and (start, sampler.global_batches, step) in ((0, 0, 1), (0, 1, 1)) and not refused:
                        refused = try_to_save(ckpt, state)
                        (folder / f"refused-{rank}.txt").write_text(refused)
                    if not sampler.complete:
                        continue
                    if step == kill_at:
                        if dist.is_initialized():
                            dist.barrier()
                        os.kill(os.getpid(), signal.SIGKILL)
                    if step % 3 == 0 or sampler.epoch >= epochs:
                        ckpt.save(step, state).durable.result()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
