"""A rank of a job with tiers: `tiers_job.py FOLDER OPTIONS`, OPTIONS being JSON.

`run`, `local`, `memory` and `keep_last` are the Checkpointer's; with `node`, so many ranks share a node, whose local
and memory tiers are in a folder of its own; `memory` may be a list, of what each rank is given. It trains until step
`until`; from step `stuck` on the disk that saves go to takes no archive any more. With `exit` the ranks leave the
Checkpointer with that code, with `unclosed` they never close it. With `late`, a step and a rank, that rank begins to
upload its part of the step before the next step, and goes on when that is saved. Before step `signal_at` rank 0 is told
to end. Each rank notes what it did in `FOLDER/rank-N.json`, and makes `FOLDER/at-STEP.N` after each step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

import ckptengine as ce
from ckptengine.catalog.listing import newest
from ckptengine.storage.local import LocalArchiveWriter, LocalStorage
from ckptengine.tiers import uploader

ROWS, COLUMNS = 1003, 257


def make_state() -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "rows": zeros(ROWS, COLUMNS, device_mesh=mesh, placements=[Shard(0)]),
        "plain": torch.zeros(100_000),
        "step": 0,
    }


def expected(step: int) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) * step


def train_to(state: dict, step: int) -> None:
    rows = state["rows"]
    assert isinstance(rows, DTensor)
    mine = expected(step).chunk(dist.get_world_size())[dist.get_rank()]
    rows.to_local().copy_(mine)
    state["plain"].fill_(step)
    state["step"] = step


def check(state: dict, step: int) -> None:
    assert state["step"] == step
    assert torch.equal(state["rows"].full_tensor(), expected(step))
    assert bool((state["plain"] == step).all())


def stick(disk: str) -> None:
    """Have a disk take no archive from now on."""
    create = LocalStorage.create_archive

    def stuck(self: LocalStorage, name: str, nbytes: int, **more: Any) -> LocalArchiveWriter:
        if str(self.root) == disk:
            time.sleep(600)
        return create(self, name, nbytes, **more)

    LocalStorage.create_archive = stuck  # type: ignore[method-assign]


def delay_upload(folder: Path, step: int) -> None:
    """Have this rank's part of a step's upload wait until the next step is saved on all ranks, to the last thread."""

    def late(share: uploader.UploadPart, *more: Any) -> None:
        if f"step-{step:08d}" in share.data:
            (folder / "late").touch()
            while len(list(folder.glob(f"at-{step + 1}.*"))) < dist.get_world_size():
                time.sleep(0.01)
        upload_part(share, *more)

    upload_part = uploader.upload_part
    uploader.upload_part = late


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    logging.basicConfig(level=logging.INFO)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    local, memory = options.get("local"), options.get("memory", False)
    if "node" in options:
        node = f"node-{rank // options['node']}"
        local = local and f"{local}/{node}"
        if memory:
            memory = f"{memory}/{node}"
            Path(memory).mkdir(exist_ok=True)
    if isinstance(memory, list):
        memory = memory[rank]
    report: dict = {"pid": os.getpid()}
    state = make_state()
    began = time.monotonic()
    ckpt = ce.Checkpointer(
        options["run"],
        every=1,
        keep_last=options.get("keep_last"),
        local=local,
        memory=memory,
        timeout=options.get("timeout", 60),
        preemption=ce.Preemption() if "signal_at" in options else None,
    )
    if rank in options.get("late", [])[1:]:
        delay_upload(folder, options["late"][0])
    with contextlib.nullcontext() if options.get("unclosed") else ckpt:
        report["restored"] = ckpt.restore(state)
        report["seconds"] = time.monotonic() - began
        if report["restored"] is not None:
            check(state, report["restored"])
        for step in range((report["restored"] or 0) + 1, options["until"] + 1):
            while [step - 1] == options.get("late", [])[:1] and not (folder / "late").exists():
                time.sleep(0.01)
            if step == options.get("stuck"):
                stick(local or options["run"])
            if step == options.get("signal_at") and rank == 0:
                os.kill(os.getpid(), signal.SIGUSR1)
            train_to(state, step)
            handle = ckpt.step(step, state)
            assert handle is not None
            if step == options.get("stuck"):
                memory_tier = ckpt._tiers.places.memory
                assert memory_tier is not None
                while (found := newest(memory_tier.storage)) is None or found.step != step:
                    time.sleep(0.01)
            else:
                handle.durable.result()
            if "late" in options:
                ckpt._saver.settle(60)  # what may be deleted after it is deleted
            (folder / f"at-{step}.{rank}").touch()
        if "wait_for" in options:
            while not Path(options["wait_for"]).exists():
                time.sleep(0.02)
        if "exit" in options:
            sys.exit(options["exit"])
    report["uploaded"] = ckpt.uploaded
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
