"""Train a small GPT with FSDP2 on the CPU, checkpointed by ckptengine. Start it with torchrun:

    torchrun --nproc-per-node=2 examples/train_gpt.py --steps 60

Start it again, with any number of ranks, and it goes on from the newest checkpoint. With `--events FOLDER`, rank 0
writes what happens to FOLDER/events.jsonl, and digests of the state before each save and after each restore into
files beside it.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digests
import torch
import torch.distributed as dist
from corpus import Windows
from gpt import GPT, GPTConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

import ckptengine as ce


class Log:
    """What rank 0 tells: a JSON line for each event where a folder is given, else some lines for a reader."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None
        self._prints = folder is None and dist.get_rank() == 0
        if folder is not None and dist.get_rank() == 0:
            self._file = (folder / "events.jsonl").open("a", buffering=1)

    def __call__(self, event: str, **fields: Any) -> None:
        if self._prints and event == "start":
            print("begins anew" if fields["resumed"] is None else f"resumed at step {fields['resumed']}", flush=True)
        if self._prints and event == "step" and fields["step"] % 10 == 0:
            print(f"step {fields['step']}: loss {fields['loss']:.3f}", flush=True)
        if self._file is not None:
            self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")


def learning_rate(step: int, warm_up: int, total: int) -> float:
    """Return the factor on the peak rate: linear warm-up, then a cosine down to a tenth."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, total - warm_up))


def train(args: argparse.Namespace) -> None:
    world_size = dist.get_world_size()
    log = Log(args.events)

    torch.manual_seed(args.seed)
    model = GPT(GPTConfig())
    mesh = init_device_mesh("cpu", (world_size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.peak_rate, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, 5, args.steps))
    # A global batch is the same at every number of ranks; `batches` counts what training was handed.
    sampler = ce.ElasticSampler(args.samples, args.batch, seed=args.seed)
    loader = DataLoader(Windows(args.samples, GPTConfig().context), batch_sampler=sampler)

    def batches() -> Iterator[Tensor]:
        while True:  # epoch after epoch
            yield from sampler.batches(loader)

    def train_step(tokens: Tensor) -> float:
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        # FSDP takes the mean over the ranks, which may have different numbers of samples.
        loss = loss * world_size / (sampler.size * GPTConfig().context)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        total = loss.detach()
        dist.all_reduce(total)
        return float(total) / world_size

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": sampler, "rng": ce.RNG()}
    with ce.Checkpointer(args.checkpoints, every=args.every, keep_last=3, timeout=args.timeout) as ckpt:
        started = time.perf_counter()
        start = ckpt.restore(state)
        log("start", resumed=start, world_size=world_size, seconds=time.perf_counter() - started)
        if start is not None and args.events is not None:
            digests.write(args.events, "restored", start, digests.leaf_digests(model, optimizer, scheduler))
        saves = 0
        for step, tokens in zip(range((start or 0) + 1, args.steps + 1), batches(), strict=False):
            loss = train_step(tokens)
            log("step", step=step, loss=loss, world_size=world_size)
            if args.events is not None and step % args.every == 0:
                digests.write(args.events, "saved", step, digests.leaf_digests(model, optimizer, scheduler))
            ckpt.step(step, state)
            saves = log_saves(log, ckpt, saves, world_size)
        ckpt.wait()
        log_saves(log, ckpt, saves, world_size)
    log("end", world_size=world_size)


def log_saves(log: Log, ckpt: ce.Checkpointer, known: int, world_size: int) -> int:
    """Log the saves that became durable since the last call; return how many there are now."""
    for save in ckpt.history[known:]:
        log(
            "save",
            step=save.step,
            world_size=world_size,
            nbytes=save.nbytes,
            stall=save.stall_seconds,
            durable=save.durable_seconds,
            waited=save.waited_seconds,
        )
    return len(ckpt.history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", default="runs/gpt", help="directory of the run")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints")
    parser.add_argument("--batch", type=int, default=8, help="samples per step, over all ranks")
    parser.add_argument("--samples", type=int, default=160, help="samples of the data set: windows of a text")
    parser.add_argument("--peak-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60, help="longest wait for other ranks, in seconds")
    parser.add_argument("--events", type=Path, help="folder for events and digests")
    args = parser.parse_args()

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    dist.init_process_group("gloo")
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
