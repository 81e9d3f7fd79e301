"""A small GPT that goes on under another split: `gpt_split_job.py FOLDER MODE STEPS KILL`.

Modes: `plain`, `fsdp1`, `fsdp1-orig`, `fsdp2`, `deepspeed-1` to `-3`; and `plain-fixed` and `zero-fixed`, which add up
gradients of single samples in their order, so that nothing depends on the number of ranks. After step KILL, and the
commit of the save before, all ranks kill themselves; 0: not at all. `FOLDER/losses` gets a line for each step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "resume"))

import torch
import torch.distributed as dist
from gpt_job import CONTEXT, GPT, VOCABULARY, Block, reduce_in_order
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ckptengine as ce

GLOBAL_BATCH, EVERY = 12, 3


def build(mode: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return the model, its optimizer (None where the engine steps), and the state."""
    torch.manual_seed(11)
    net: nn.Module = GPT(0.0)
    kind = mode.partition("-")[0]
    if kind == "deepspeed":
        return build_deepspeed(net, int(mode[-1]))
    if kind == "fsdp1":
        policy = ModuleWrapPolicy({Block})
        net = FullyShardedDataParallel(
            net, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=mode == "fsdp1-orig"
        )
    elif mode == "fsdp2":
        for block in net.h:
            fully_shard(block)
        fully_shard(net)
    elif mode == "plain" and dist.get_world_size() > 1:
        net = DistributedDataParallel(net)
    optimizer: Any
    if kind == "zero":
        optimizer = ZeroRedundancyOptimizer(
            net.parameters(), torch.optim.AdamW, parameters_as_bucket_view=dist.get_world_size() > 2, lr=3e-3
        )
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8)
    return net, optimizer, {"model": net, "optimizer": optimizer, "scheduler": scheduler}


def build_deepspeed(net: nn.Module, stage: int) -> tuple[nn.Module, Any, dict[str, Any]]:
    import deepspeed

    from ckptengine.integrations import deepspeed as ce_deepspeed

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False  # it would compile an operator
    deepspeed.init_distributed("gloo")
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its default clips
    }
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer, config=config,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8),
    )  # fmt: skip
    return engine, None, ce_deepspeed.state(engine)


def samples_of(step: int) -> Tensor:
    """Return this rank's part of a step's global batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    whole = torch.randint(VOCABULARY, (GLOBAL_BATCH, CONTEXT + 1), generator=generator)
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train_step(mode: str, model: Any, optimizer: Any, state: dict[str, Any], step: int) -> list[float]:
    """Train one step; return this rank's losses."""
    batch = samples_of(step)
    if optimizer is None:
        loss = loss_of(model, batch)
        model.backward(loss)
        model.step()
        return [float(loss.detach())]
    if mode.endswith("-fixed"):
        losses, gradients = [], []
        for sample in batch.split(1):
            loss = loss_of(model, sample) / GLOBAL_BATCH
            losses.append(float(loss.detach()))
            found = torch.autograd.grad(loss, list(model.parameters()))
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        reduce_in_order(model, gradients)
    else:
        loss = loss_of(model, batch)
        loss.backward()
        losses = [float(loss.detach())]
    optimizer.step()
    optimizer.zero_grad()
    state["scheduler"].step()
    return losses


def main() -> None:
    folder, mode, steps, kill = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, optimizer, state = build(mode)
    with ce.Checkpointer(folder / "run", every=EVERY, timeout=60) as ckpt:
        start = ckpt.restore(state, strict=was_deepspeed(folder, mode) == mode.startswith("deepspeed"))
        for step in range((start or 0) + 1, steps + 1):
            losses = train_step(mode, model, optimizer, state, step)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, losses)
            if dist.get_rank() == 0:
                flat = [value for one in everyone for value in one]
                line = {"step": step, "ranks": len(everyone), "mode": mode, "losses": [value.hex() for value in flat]}
                with (folder / "losses").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            ckpt.step(step, state)
            if step == kill:
                ckpt.wait()
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


def was_deepspeed(folder: Path, mode: str) -> bool:
    """Whether the newest step was trained with DeepSpeed, which has some progress of its own to restore."""
    path = folder / "losses"
    lines = path.read_text().splitlines() if path.exists() else []
    return "deepspeed" in (json.loads(lines[-1])["mode"] if lines else mode)


if __name__ == "__main__":
    main()
