"""A training script that uses torch's distributed checkpoint; what it is told to import decides whose."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dcp: Any = importlib.import_module(sys.argv[1])


class AppState(Stateful):
    """As in PyTorch's tutorial."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)  # the same on all ranks: averages over 1, 2 and 4 of them are the same bits
        optimizer.zero_grad()
        net(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()


def digest(net: nn.Module) -> str:
    whole = b"".join(p.full_tensor().detach().numpy().tobytes() for p in net.parameters())
    return hashlib.sha256(whole).hexdigest()


def main(action: str, place: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    net, optimizer = made(seed=1 if action in ("save", "async_save", "whole") else 2)
    state = {"app": AppState(net, optimizer), "step": 0, "seen": []}
    if action != "load":
        train(net, optimizer, range(3))
        state |= {"step": 3, "seen": [4, "x", (1, None)]}
    if action == "save":
        dcp.save(state, checkpoint_id=place)
    elif action == "async_save":
        future = dcp.async_save(state, checkpoint_id=place)
        getattr(future, "upload_completion", future).result()
    elif action == "load":
        dcp.load(state, checkpoint_id=place)
        assert state["step"] == 3, state["step"]
        assert state["seen"] == [4, "x", (1, None)], state["seen"]
    train(net, optimizer, range(3, 6))
    result = digest(net)
    if dist.get_rank() == 0:
        (folder / f"{action}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
