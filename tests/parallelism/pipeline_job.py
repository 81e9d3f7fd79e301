"""A small GPT in pipeline stages, by torch's own schedules: `pipeline_job.py FOLDER SCHEDULE --steps N [--die-at N]`.

SCHEDULE is `1f1b` (one stage per rank), `interleaved` (two chunks per rank) or `none` (one rank, no pipeline); or
`fsdp1`, `fsdp2` or `zero`, by which the ranks share the whole model, and the micro-batches. The rank that has the head
appends a line for each step to `FOLDER/losses`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ckptengine as ce

WIDTH, VOCABULARY, CONTEXT, LAYERS, BATCH, MICRO_BATCHES = 16, 32, 8, 4, 8, 4
NAMES = ("embed", *(f"h{number}" for number in range(LAYERS)), "head")
EVERY = 2
SHARED = ("fsdp1", "fsdp2", "zero")


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Part(nn.Module):
    """Some of the model's modules, under the names that they have in the whole model."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = {name: self._made(name) for name in NAMES}  # all of them: each gets the same weights whatever the split
        for name in names:
            self.add_module(name, made[name])

    @staticmethod
    def _made(name: str) -> nn.Module:
        if name == "embed":
            return Embed()
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)) if name == "head" else Block()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def parts_of(stages: int) -> list[tuple[str, ...]]:
    each = LAYERS // stages
    found = [tuple(f"h{n}" for n in range(stage * each, (stage + 1) * each)) for stage in range(stages)]
    found[0] = ("embed", *found[0])
    found[-1] = (*found[-1], "head")
    return found


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def shared(whole: nn.Module, how: str) -> Any:
    """Return a model that all ranks have, each its part of it or of the optimizer's state."""
    if how == "fsdp1":
        return FullyShardedDataParallel(whole, use_orig_params=True, device_id=torch.device("cpu"))
    return fully_shard(whole) if how == "fsdp2" else DistributedDataParallel(whole)


def optimizer_of(parameters: list[tuple[Any, int]], how: str) -> torch.optim.Optimizer:
    """Return an optimizer over parameters, given with the number of dimensions that each has as a whole."""
    groups = [{"params": [p for p, dims in parameters if dims > 1]},
              {"params": [p for p, dims in parameters if dims < 2], "weight_decay": 0.0}]  # fmt: skip
    if how == "zero":
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=1e-2)
    return torch.optim.AdamW(groups, lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("schedule", choices=("1f1b", "interleaved", "none", *SHARED))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--die-at", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = {"1f1b": ranks, "interleaved": 2 * ranks}.get(args.schedule, 1)
    mine = range(0 if count == 1 else rank, count, ranks)
    chunks: list[Any] = [Part(parts_of(count)[number]) for number in mine]
    dims = [p.ndim for chunk in chunks for p in chunk.parameters()]  # FSDP1 has flat ones in their place
    stages = (
        []
        if args.schedule in SHARED
        else [PipelineStage(c, n, count, torch.device("cpu")) for c, n in zip(chunks, mine, strict=True)]
    )
    schedule: Any = None
    if args.schedule == "1f1b":
        schedule = Schedule1F1B(stages[0], MICRO_BATCHES, loss_fn=loss_of)
    elif args.schedule == "interleaved":
        schedule = ScheduleInterleaved1F1B(stages, MICRO_BATCHES, loss_fn=loss_of)
    sharing = ranks if args.schedule in SHARED else 1
    if sharing > 1:
        chunks = [shared(chunks[0], args.schedule)]
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    optimizer = optimizer_of(list(zip(parameters, dims, strict=True)), args.schedule)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    model = ce.Merged(chunks) if len(chunks) > 1 else chunks[0]
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": ce.RNG()}
    first, last = 0 in mine, count - 1 in mine

    with ce.Checkpointer(args.folder / "run", every=EVERY, keep_last=2, timeout=60) as ckpt:
        start = ckpt.restore(state) or 0
        for step in range(start + 1, args.steps + 1):
            optimizer.zero_grad()
            tokens, target = batch_of(step)
            losses: list[Tensor] = []
            if schedule is None:
                batches = list(zip(tokens.chunk(MICRO_BATCHES), target.chunk(MICRO_BATCHES), strict=True))
                for x, y in batches if sharing == 1 else batches[rank::sharing]:
                    losses.append(loss_of(chunks[0](x), y))
                    losses[-1].backward()
                for parameter in parameters:
                    if parameter.grad is not None:  # FSDP1 leaves those of which a rank has nothing without one
                        parameter.grad.div_(MICRO_BATCHES // sharing)  # as the schedules do
            else:
                ends = {"target": target, "losses": losses} if last else {}
                schedule.step(*((tokens,) if first else ()), **ends)
            optimizer.step()
            scheduler.step()
            if sharing > 1:
                every: list[Any] = [None] * ranks
                dist.all_gather_object(every, [float(one) for one in losses])
                losses = [torch.tensor(one) for one in itertools.chain(*zip(*every, strict=True))]
            if last and (sharing == 1 or rank == 0):
                with (args.folder / "losses").open("a") as file:
                    file.write(f"{step} {args.schedule} {ranks} {' '.join(float(x).hex() for x in losses)}\n")
            ckpt.step(step, state)
            if step == args.die_at:
                ckpt.wait()
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
        ckpt.save(args.steps, state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
