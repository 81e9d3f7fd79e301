"""A small GPT with everything that a resume must bring back: `gpt_job.py FOLDER --mode ddp|fixed|fsdp ...`.

Dropout, augmentation by NumPy's and Python's generators, AdamW, warm-up and cosine, shuffled data, gradient
accumulation, an exponential average of the weights. Each rank appends a line for each step to
`FOLDER/rank-R.jsonl`, and what it has at the end goes to `FOLDER/final-R.json`. Modes:

- `ddp`: DistributedDataParallel, its own reduction; the ranks' own random streams;
- `fixed`: gradients of fixed micro-batches are gathered and added in their order, and dropout is seeded for each
  micro-batch, so that nothing depends on the number of ranks;
- `fsdp`: FSDP2 with its own reduction, no dropout.

To be killed at a certain place, a job waits there: `--stay STEP` after a step, `--hold-save STEP OPERATION` where the
save of a step comes to an operation of the disk, `--hold-restore` where a restore reads.
"""

import argparse
import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import ckptengine as ce
from ckptengine.storage.disk import Disk
from ckptengine.storage.local import LocalStorage

WIDTH, HEADS, LAYERS, CONTEXT, VOCABULARY = 32, 2, 2, 16, 64
SAMPLES, GLOBAL_BATCH, MICRO_BATCH, SEED = 94, 12, 1, 7


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH)))
        out: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return out


class GPT(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block(dropout) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.drop = nn.Dropout(dropout)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.token(tokens) + self.position(torch.arange(tokens.shape[1])))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Windows(Dataset[Tensor]):
    """Windows of a made-up text; each item carries its own number, so that the job can say what it was handed."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.text = torch.randint(VOCABULARY, (SAMPLES + CONTEXT,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([torch.tensor([index]), self.text[index : index + CONTEXT + 1]])


def loss_of(model: nn.Module, batch: Tensor, size: int) -> Tensor:
    """Return the batch's part of the mean loss over `size` samples."""
    tokens = batch[:, 1:]
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / (size * CONTEXT)


def reduce_in_order(model: nn.Module, gradients: list[Tensor]) -> None:
    """Set the gradients to the sum over all ranks' micro-batches, added in the order of the global batch."""
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(gradients)))
    width = int(max(counts))
    padded = torch.zeros(width, gradients[0].numel())
    padded[: len(gradients)] = torch.stack(gradients)
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    total = torch.zeros(padded.shape[1])
    for count, theirs in zip(counts, everyone, strict=True):
        for gradient in theirs[: int(count)]:
            total += gradient
    for parameter, gradient in zip(
        model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter).clone()


def regroup(model: nn.Module) -> None:
    """Let DDP arrange its buckets of gradients.

    It does so in the second step of each process, and sums in another order from then on: without this the first step
    of each life would differ in its last bits from the same step of a job that lives on.
    """
    for _ in range(2):
        loss_of(model, torch.zeros(MICRO_BATCH, CONTEXT + 2, dtype=torch.int64), 1).backward()
    model.zero_grad()


def digest(*values: Any) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found.update(whole.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


def state_digests(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, average: Any) -> dict[str, str]:
    """Return digests of what all ranks share; with FSDP2 each is a collective."""
    moments = [item for p in model.parameters() for _, item in sorted(optimizer.state.get(p, {}).items())]
    return {
        "weights": digest(*model.state_dict().values()),
        "optimizer": digest(*moments, [group["lr"] for group in optimizer.param_groups]),
        "scheduler": digest(sorted(scheduler.state_dict().items(), key=lambda item: item[0])),
        "average": "" if average is None else digest(*average.state_dict().values()),
    }


def random_digest() -> str:
    """Return a digest of this rank's streams, without drawing."""
    legacy = np.random.get_state()
    return digest(random.getstate(), legacy[1].tobytes(), legacy[2:], torch.get_rng_state())


def held(*_: Any) -> None:
    """Wait to be killed."""
    time.sleep(600)


def hold_save(step: int, name: str) -> None:
    """Have an operation of the disk wait below a step's directory: a claim of a generation goes on."""
    operation = getattr(Disk, name)

    def hold(disk: Disk, *arguments: Any) -> Any:
        place = arguments[0] if isinstance(arguments[0], str) else os.readlink(f"/proc/self/fd/{arguments[0]}")
        if f"/step-{step:08d}/" in place:
            held()
        return operation(disk, *arguments)

    setattr(Disk, name, hold)


def train(args: argparse.Namespace) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED)  # the same weights on all ranks
    bare = GPT(0.0 if args.mode == "fsdp" else 0.1)
    model: nn.Module = bare
    if args.mode == "ddp":
        model = DistributedDataParallel(bare)
        regroup(model)
    elif args.mode == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
        for block in bare.h:
            fully_shard(block, mesh=mesh)
        fully_shard(bare, mesh=mesh)
    torch.manual_seed(SEED + 1 + rank)  # and each rank's own dropout
    np.random.seed(SEED + rank)
    random.seed(SEED + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps - 5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[5])
    average = None if args.mode == "fsdp" else AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    # FSDP gathers the weights in every forward pass, so all ranks need the same number of passes: one per step.
    micro_batch = None if args.mode == "fsdp" else MICRO_BATCH
    sampler = ce.ElasticSampler(SAMPLES, GLOBAL_BATCH, seed=SEED, micro_batch=micro_batch)
    loader = DataLoader(Windows(), batch_sampler=sampler)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler, "rng": ce.RNG()}
    if average is not None:
        state["average"] = average

    log = (args.folder / f"rank-{rank}.jsonl").open("a", buffering=1)

    def say(event: str, **fields: Any) -> None:
        log.write(json.dumps({"event": event, "ranks": world_size, "time": time.time(), **fields}) + "\n")

    with ce.Checkpointer(args.folder / "run", every=args.every, timeout=60) as ckpt:
        if args.hold_save:
            hold_save(int(args.hold_save[0]), args.hold_save[1])
        if args.hold_restore:
            LocalStorage.load_archive = held  # type: ignore[assignment, method-assign]
        say("restoring")
        start = ckpt.restore(state)
        say(
            "start",
            step=start,
            epoch=sampler.epoch,
            random=random_digest(),
            state=state_digests(model, optimizer, scheduler, average),
        )
        step = start or 0
        while step < args.steps:
            losses: list[float] = []
            samples: list[int] = []
            gradients: list[Tensor] = []
            for batch in sampler.batches(loader):
                size, is_last = sampler.size, sampler.complete
                samples += batch[:, 0].tolist()
                if args.mode == "fixed":
                    torch.manual_seed(1_000_003 * step + samples[-1])
                # Augmentation: some tokens are replaced, as NumPy's and Python's streams of this rank say.
                if args.mode == "ddp" and random.random() < 0.5:
                    batch[:, 1 + int(np.random.randint(CONTEXT))] = int(np.random.randint(VOCABULARY))
                if isinstance(model, DistributedDataParallel):
                    model.require_backward_grad_sync = is_last
                elif args.mode == "fsdp":
                    model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
                loss = loss_of(model, batch, size)
                losses.append(float(loss.detach()))
                if args.mode == "fixed":
                    found = torch.autograd.grad(loss, list(model.parameters()))
                    gradients.append(torch.cat([gradient.flatten() for gradient in found]))
                else:
                    (loss * world_size).backward()  # the reduction is a mean over the ranks
                if not is_last:
                    continue
                if args.mode == "fixed":
                    reduce_in_order(model, gradients)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                if average is not None:
                    average.update_parameters(bare)
                step += 1
                say(
                    "step",
                    step=step,
                    losses=[value.hex() for value in losses],
                    samples=samples,
                    rate=scheduler.get_last_lr(),
                )
                if args.digests and step % args.every == 0:
                    say("saved", step=step, state=state_digests(model, optimizer, scheduler, average))
                ckpt.step(step, state)
                if step == args.stay:
                    held()
                losses, samples, gradients = [], [], []
                if args.pause:
                    time.sleep(args.pause)
                if step == args.steps:
                    break
        ckpt.save(step, state)
        final = {"step": step, "epoch": sampler.epoch, "random": random_digest()}
        final |= state_digests(model, optimizer, scheduler, average)
    (args.folder / f"final-{rank}.json").write_text(json.dumps(final))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("ddp", "fixed", "fsdp"), required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds after each step, so that kills can fall anywhere"
    )
    parser.add_argument("--stay", type=int)
    parser.add_argument("--hold-save", nargs=2)
    parser.add_argument("--hold-restore", action="store_true")
    parser.add_argument("--digests", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ.get("RANK"), "start it with torchrun"
    main()
