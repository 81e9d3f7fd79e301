"""A rank of a sharded job whose optimizers and modules have calls of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptengine as ce

sys.path.insert(0, str(Path(__file__).parent.parent / "torch"))
sys.path.insert(0, str(Path(__file__).parent.parent / "state"))
from test_own_calls import Container, Lookahead, Nested, Text, Warm


class Cached(nn.Linear):
    """Has loading code of its own."""

    loads = 0

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.loads += 1


MAKERS = {
    "beside": lambda m: Warm(m.parameters()),
    "shared": lambda m: Lookahead(torch.optim.AdamW(m.parameters(), lr=0.1)),
    "nested": lambda m: Nested(torch.optim.Adam(m.parameters(), lr=0.1)),
    "container": lambda m: Container(torch.optim.Adam(m[0].parameters()), torch.optim.Adam(m[2].parameters())),
    "text": lambda m: Text(m.parameters(), lr=0.1),
}


def made(seed: int, name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Cached(6, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net, mesh=mesh)
    return net, MAKERS[name](net)


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        net(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    outcome = {}
    for name in MAKERS:
        net, optimizer = made(1, name)
        train(net, optimizer, range(3))
        ce.save(folder / name, {"model": net, "optimizer": optimizer})
        train(net, optimizer, range(3, 6))
        other, fresh = made(2, name)
        ce.load(folder / name, into={"model": other, "optimizer": fresh})
        loads = other[2].loads
        train(other, fresh, range(3, 6))
        pairs = list(zip(net.parameters(), other.parameters(), strict=True))
        outcome[name] = {
            "equal": all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs),
            "sharded": all(isinstance(b, DTensor) for _, b in pairs),
            "loads": loads,
        }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
