"""An engine with bf16 weights: `deepspeed_job.py FOLDER STAGE` tells what a restore of parts of its state gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import ckptengine as ce
from ckptengine.errors import CheckpointError
from ckptengine.integrations import deepspeed as ce_deepspeed


def make(stage: int, seed: int) -> Any:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters(), lr=0.1), config=config)
    return engine


def train(engine: Any, steps: int = 2) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 5, dtype=torch.bfloat16)).square().sum())
        engine.step()


def weights(engine: Any) -> dict[str, list[Any]]:
    """Return what the engine computes with."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().float().tolist() for name, p in engine.module.named_parameters()}


def refused(call: Any) -> str:
    try:
        call()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Odd:
    """What a loss scaler might keep."""


def main() -> None:
    folder, stage = Path(sys.argv[1]), int(sys.argv[2])
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False  # it would compile an operator
    deepspeed.init_distributed("gloo")
    first, told = make(stage, 0), {}
    train(first)
    ce.save(folder / "saved", ce_deepspeed.state(first))
    told["expected"] = weights(first)

    second = make(stage, 1)
    train(second, 1)
    told["before"] = weights(second)
    ce.load(folder / "saved", into=ce_deepspeed.state(second), only=["model"])
    told["found"] = weights(second)

    scaler: Any = second.optimizer.loss_scaler
    scaler.cur_scale = 4.0
    ce.save(folder / "scaled", ce_deepspeed.state(second))
    third = make(stage, 2)
    ce.load(folder / "scaled", into=ce_deepspeed.state(third))
    told["scale"] = third.optimizer.loss_scaler.cur_scale
    scaler.odd = Odd()
    told["odd"] = refused(lambda: ce.save(folder / "odd", ce_deepspeed.state(second)))
    scaler.odd, scaler.dynamic = 1, True
    told["other"] = refused(lambda: ce.load(folder / "scaled", into=ce_deepspeed.state(second)))
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
