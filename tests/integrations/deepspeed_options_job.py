"""Engines with options that change where DeepSpeed keeps what it trains: `deepspeed_options_job.py FOLDER`, 2 ranks.

Each is saved, compared with what it computes with, and restored into an engine that has other weights and has computed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import ckptengine as ce
from ckptengine.integrations import deepspeed as ce_deepspeed

ROWS = torch.arange(48.0).view(8, 6).sin()
CASES: dict[str, dict[str, Any]] = {
    "round robin": {"stage": 2, "round_robin_gradients": True},
    "frozen": {"stage": 3, "stage3_param_persistence_threshold": 8},
    "hpz": {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2},
}


def build(case: str, seed: int) -> Any:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 3))
    if case == "frozen":
        net[0].requires_grad_(False)
        net[2].bias.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": CASES[case],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def losses(engine: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        loss = engine(ROWS.chunk(2)[dist.get_rank()]).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return the whole weights that the module computes with."""
    named = dict(engine.module.named_parameters())
    if not all(hasattr(parameter, "ds_id") for parameter in named.values()):
        return {name: parameter.detach().clone() for name, parameter in named.items()}
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def differing(folder: Path, case: str) -> list[str]:
    engine = build(case, 0)
    losses(engine, 2)
    truth = weights(engine)
    ce.save(folder / case, ce_deepspeed.state(engine), timeout=60)
    stored = ce.load(folder / case)["model"]
    wrong = [f"stored {name}" for name in truth if not torch.equal(torch.as_tensor(stored[name]), truth[name])]
    expected = losses(engine, 3)
    other = build(case, 1)
    losses(other, 1)
    ce.load(folder / case, into=ce_deepspeed.state(other), timeout=60)
    back = weights(other)
    wrong += [f"restored {name}" for name in truth if not torch.equal(back[name], truth[name])]
    return wrong + ([] if losses(other, 3) == expected else ["losses"])


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False  # it would compile an operator
    deepspeed.init_distributed("gloo")
    found = {case: differing(folder, case) for case in CASES}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
