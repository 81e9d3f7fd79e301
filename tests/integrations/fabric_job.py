"""A loop with Lightning's Fabric, as a script: `fabric_job.py OPTIONS`; its wrapped objects are the state."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from dying import die
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch.utils.data import DataLoader

import ckptengine as ce
from ckptengine.integrations.lightning import CheckpointIO

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
RANK = int(os.environ.get("RANK", "0"))
warnings.filterwarnings("ignore")


def main() -> None:
    """Train, or go on."""
    torch.set_num_threads(1)
    ranks = OPTIONS.get("ranks", 1)
    strategy = DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, plugins=[CheckpointIO()])
    fabric.launch()
    fabric.seed_everything(7)
    bare = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))
    model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters(), lr=0.01))
    torch.manual_seed(100 + RANK)
    data = torch.rand(40, 8, generator=torch.Generator().manual_seed(2))
    sampler = ce.ElasticSampler(len(data), 4, seed=5)
    loader = fabric.setup_dataloaders(
        DataLoader(data, batch_sampler=sampler, num_workers=OPTIONS.get("workers", 0)), use_distributed_sampler=False
    )
    state = {"model": model, "optimizer": optimizer, "data": sampler, "rng": ce.RNG()}
    with ce.Checkpointer(OPTIONS["run"], every=3) as ckpt:
        start = ckpt.restore(state)
        while sampler.epoch < 2:
            for batch in sampler.batches(loader):
                if sampler.global_batches == OPTIONS.get("kill") and not Path(OPTIONS["killed"]).exists():
                    die(OPTIONS)
                loss = model(batch).pow(2).mean()
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                with open(f"{OPTIONS['log']}.{RANK}", "a") as file:
                    file.write(json.dumps([sampler.global_batches, loss.item().hex()]) + "\n")
                ckpt.step(sampler.global_batches, state)
        ckpt.save(sampler.global_batches, state)
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for tensor in [*bare.state_dict().values(), *(v for one in optimizer.state.values() for v in one.values())]:
        digest.update(tensor.detach().numpy().tobytes())
    Path(f"{OPTIONS['end']}.{RANK}").write_text(json.dumps([start, digest.hexdigest()]))
    check_own_calls(fabric, bare, model, optimizer)


def check_own_calls(fabric: Fabric, bare: torch.nn.Module, model: Any, optimizer: Any) -> None:
    """Fabric's own `save` and `load`, through the plugin: all comes back, on all ranks."""
    path = Path(OPTIONS["run"]).with_name("own.ckpt")
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 20})
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    moments = [value.clone() for one in optimizer.state.values() for value in one.values()]
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.zero_()
    for one in optimizer.state.values():
        for value in one.values():
            value.zero_()
    state = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(path, state)
    assert state["step"] == 20
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())
    after = [value for one in optimizer.state.values() for value in one.values()]
    assert all(torch.equal(one, other) for one, other in zip(after, moments, strict=True))


if __name__ == "__main__":
    main()
