"""A small loop of Accelerate: random crops in the collator, dropout, accumulation; one job of one or more ranks.

`accelerate_job.py RUN OUT SETTINGS`: SETTINGS is JSON, with `loader` for DataLoaderConfiguration, `accumulation`,
`workers`, `fsdp` (1 or 2), and `kill`, the step after which the process gets SIGKILL, once a checkpoint is committed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader, TensorDataset

import ckptengine as ce
from ckptengine.integrations.accelerate import Prepared

torch.set_num_threads(1)
EPOCHS = 3


class Average:
    """A registered object: the running mean of the losses."""

    def __init__(self) -> None:
        self.mean = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def cropped(samples: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    rows = torch.stack([one[0] for one in samples])
    return rows * (torch.rand(rows.shape) < 0.7)


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def train(run: Path, out: Path, settings: dict[str, Any]) -> None:
    """Train, and write what came out."""
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._reset_state()
    torch.manual_seed(5)
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.get("accumulation", 1),
        dataloader_config=DataLoaderConfiguration(**settings.get("loader", {})),
    )
    if settings.get("fsdp"):  # Accelerate itself chooses it on accelerators only
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.device = torch.device("cpu")  # without a number, which FSDP1 does not take
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=settings["fsdp"], use_orig_params=settings.get("original"), auto_wrap_policy="no_wrap"
        )
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.2), torch.nn.GELU(), torch.nn.Linear(16, 6))
    if settings.get("fsdp") == 1:  # flat parameters are there only then
        model = accelerator.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    rows = torch.randn(settings.get("samples", 22), 6, generator=torch.Generator().manual_seed(1))
    collate = cropped if settings.get("crops", True) else torch.utils.data.default_collate
    loader = DataLoader(
        TensorDataset(rows),
        2 // settings.get("halves", 1),
        True,
        collate_fn=collate,
        num_workers=settings.get("workers", 0),
    )
    model, optimizer, scheduler, loader, held_out = accelerator.prepare(
        model, optimizer, scheduler, loader, DataLoader(TensorDataset(rows[:4]), 2)
    )
    average = Average()
    accelerator.register_for_checkpointing(average)
    loop, losses, step = Prepared(accelerator), [], 0
    with ce.Checkpointer(run, every=2) as ckpt:
        step = ckpt.restore(loop.state()) or 0
        while loop.epoch(loader) < EPOCHS:
            for batch in loop.batches(loader):
                batch = batch[0] if isinstance(batch, list | tuple) else batch
                if settings.get("kill") == step and accelerator.process_index == settings.get("rank", 0):
                    ckpt.wait()
                    os.kill(os.getpid(), signal.SIGKILL)
                with accelerator.accumulate(model):
                    loss = (model(batch) - batch).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                average.mean = 0.9 * average.mean + 0.1 * accelerator.reduce(loss.detach(), "mean").item()
                losses.append((step, loss.item()))
                if accelerator.sync_gradients:
                    step += 1
                    if settings.get("look") and step % 3 == 0:
                        torch.rand(len([0 for _ in held_out]))
                    ckpt.step(step, loop.state())
    tensors = dict(accelerator.unwrap_model(model).state_dict())
    if settings.get("fsdp"):  # what this rank has
        tensors = {name: local(tensor) for name, tensor in model.named_parameters()}
    moments = optimizer.optimizer.state_dict()["state"]
    tensors |= {f"optimizer.{n}.{name}": local(value) for n, one in moments.items() for name, value in one.items()}
    found = {"tensors": tensors, "random": torch.get_rng_state(), "loss": losses[-1], "average": average.mean}
    torch.save(found | {"step": step, "rate": scheduler.get_last_lr()}, f"{out}-{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
