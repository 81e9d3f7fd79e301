"""What the cases of `dtensor_worker.py` share: their list, meshes and models, and all ranks' boxes put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from state_memory import Stored, read_part
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptengine.schema.dtypes import DTYPES
from ckptengine.state.bind import Saved, SavedLeaf
from ckptengine.state.outline import decode_outline
from ckptengine.state.tree import flatten

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def gather(state: dict[str, Any], outlined: bool = False) -> Stored:
    """Return all ranks' boxes as whole arrays; every element must be there, and replicas must agree."""
    flat = flatten(state)
    mine = {
        leaf.path: [(part.box, read_part(part, leaf.dtype).tobytes()) for part in leaf.parts] for leaf in flat.arrays
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    arrays, leaves = {}, {}
    for leaf in flat.arrays:
        dtype = DTYPES[leaf.dtype].numpy
        whole, seen = np.zeros(leaf.shape, dtype), np.zeros(leaf.shape, bool)
        for parts in everyone:
            own = np.zeros(leaf.shape, int)
            for box, data in parts[leaf.path]:
                where = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
                values = np.frombuffer(data, dtype).reshape(box.shape)
                assert box.volume > 0
                assert not (seen[where] & (whole[where] != values)).any(), f"{leaf.path}: replicas differ"
                own[where] += 1
                whole[where], seen[where] = values, True
            assert own.max(initial=0) <= 1, f"{leaf.path}: one rank's boxes overlap"
        assert seen.all(), f"{leaf.path}: not covered"
        arrays[leaf.path, None] = whole
        leaves[leaf.path] = SavedLeaf(leaf.dtype, leaf.shape, leaf.placement, leaf.container)
    outline = decode_outline(flat.outline.encoded, len(leaves)) if outlined else None
    saved = Saved(dist.get_world_size(), leaves, flat.values, flat.aliases, flat.containers, outline=outline)
    return Stored(saved, arrays)


def full(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().numpy()


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


class Net(nn.Module):
    """Sizes that no number of ranks divides; the last has fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(6, 10)
        self.tied.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.tanh(self.up(x)) + self.tied(x)))


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, hidden), nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def fsdp(mesh: DeviceMesh, model: nn.Module, **options: Any) -> nn.Module:
    fully_shard(model, mesh=mesh, **options)
    return model


def fsdp_tp(hidden: int) -> nn.Module:
    mesh = mesh_of(2, 2)
    model = Block(hidden)
    parallelize_module(model, mesh["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fsdp(mesh["a"], model)
