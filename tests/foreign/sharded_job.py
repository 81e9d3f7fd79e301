"""One of some ranks that load foreign checkpoints into a sharded model, started as torchrun starts it.

`sharded_job.py FOLDER SOURCE…` writes to `FOLDER/rank-N.json` what each load read and needed, and compares what it
filled with the model that was written. A source `write` writes a DCP directory from these ranks first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from foreign_models import model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.load.loader import LoadOptions, load_newest
from ckptengine.storage.open import open_storage


def sharded(seed: int) -> nn.Module:
    net = model(seed)
    for layer in net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    fully_shard(net)
    return net


def full(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in state.items()}


def stepped(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model after one step of its optimizer, and that."""
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return net, optimizer


def compare(net: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = full(net.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def main() -> None:
    folder, sources = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected = dict(model(1).state_dict())
    report = {}
    for source in sources:
        if source == "write":
            dcp.save({"net": sharded(1).state_dict()}, checkpoint_id=folder / f"dcp-{ranks}")
            continue
        path = folder / source
        net = sharded(2)
        if source.startswith("trained"):
            optimizer = torch.optim.AdamW(net.parameters())
            ce.load(path, into={"net": net, "optimizer": optimizer})
            compare(net, stepped(model(1))[0].state_dict())
            saved = stepped(model(1))[1].state_dict()["state"]
            for number, state in optimizer.state_dict()["state"].items():
                for key, tensor in full(state).items():
                    assert torch.equal(tensor, saved[number][key]), (number, key)
            continue
        rename = None if source.startswith("dcp") else {"": "net"}
        options = LoadOptions.of(None, rename, True, False)
        loaded = load_newest(open_storage(path), {"net": net}, current(60), 60, options)
        assert loaded.report.complete, loaded.report
        compare(net, expected)
        # Split by columns, as tensor parallelism does.
        mesh = init_device_mesh("cpu", (ranks,))
        weight = distribute_tensor(torch.zeros(50, 37), mesh, [Shard(1)])
        name = "net.0.weight" if source.startswith("dcp") else "0.weight"
        ce.load(path, into={"w": weight}, rename={name: "w"}, only=["w"])
        assert torch.equal(weight.full_tensor(), expected["0.weight"])
        report[source] = {
            "read": loaded.counts.read, "needed": loaded.counts.needed, "node": loaded.counts.node_needed,
        }  # fmt: skip
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
