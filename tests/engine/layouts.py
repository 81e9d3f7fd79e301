"""One small network, and every way in which ranks can share it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Tensors = dict[str, torch.Tensor]


class Net(nn.Module):
    """Odd sizes, fewer rows than ranks, two dtypes, a tied weight and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.fc1 = nn.Linear(5, 10)
        self.bn = nn.BatchNorm1d(10)
        self.fc2 = nn.Linear(10, 3)
        self.bf16 = nn.Linear(3, 5, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


def network(seed: int, values: Tensors | None = None) -> Net:
    """Return the network with random parameters and buffers, some of them replaced by `values`."""
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        net.bn.running_mean.normal_()
        net.bn.running_var.uniform_()
        net.bn.num_batches_tracked.fill_(seed)
        for name, parameter in net.named_parameters():
            if values is not None:
                parameter.copy_(values[name])
    return net


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimizer, without state."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True, fused=True)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take two steps with gradients that are a function of each element alone."""
    for _ in range(2):
        for parameter in model.parameters():
            value = parameter.detach()
            if isinstance(value, DTensor):
                local = value.to_local() * 0.5 + 0.25
                parameter.grad = DTensor.from_local(
                    local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()
                )
            else:
                parameter.grad = value * 0.5 + 0.25
        optimizer.step()


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@cache
def reference() -> tuple[Net, dict[str, Tensors]]:
    """Return the whole network after two steps, and what is to be equal: kind, then name, then tensor.

    They are the same objects at each call, and not to be changed.
    """
    net = network(1)
    optimizer = optimizer_of(net)
    take_steps(net, optimizer)
    kinds = {"param": {name: value.detach() for name, value in net.named_parameters()}}
    for moment in MOMENTS:
        kinds[moment] = {name: optimizer.state[p][moment] for name, p in net.named_parameters()}
    return net, kinds


# Layouts: a function of the whole network that returns the distributed one.


def alone(net: Net) -> nn.Module:
    return net


def replicas(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def fsdp(net: Net) -> nn.Module:
    return _shard(net, _mesh("dp"))


def fsdp_by_layer(net: Net) -> nn.Module:
    mesh = _mesh("dp")
    for layer in (net.fc1, net.fc2, net.bf16):
        fully_shard(layer, mesh=mesh)
    return _shard(net, mesh)


def hsdp_of(outer: int) -> Any:
    return lambda net: _shard(net, _mesh("outer", "dp", sizes=(outer, -1)))


def tensor_rows(net: Net) -> nn.Module:
    return _tensor_parallel(net, _mesh("tp"), 0)


def tensor_columns(net: Net) -> nn.Module:
    return _tensor_parallel(net, _mesh("tp"), 1)


def fsdp_tensor_of(tensor: int, dim: int) -> Any:
    def layout(net: Net) -> nn.Module:
        mesh = _mesh("dp", "tp", sizes=(-1, tensor))
        return _shard(_tensor_parallel(net, mesh["tp"], dim), mesh["dp"])

    return layout


def hsdp_tensor(net: Net) -> nn.Module:
    mesh = _mesh("outer", "dp", "tp", sizes=(1, -1, 2))
    return _shard(_tensor_parallel(net, mesh["tp"], 0), mesh["outer", "dp"])


def _mesh(*names: str, sizes: tuple[int, ...] = (-1,)) -> DeviceMesh:
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    shape = tuple(size if size > 0 else dist.get_world_size() // known for size in sizes)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _shard(net: Net, mesh: DeviceMesh) -> nn.Module:
    fully_shard(net, mesh=mesh)
    return net


def _tensor_parallel(net: Net, mesh: DeviceMesh, dim: int) -> Net:
    known: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(dim) if dim < parameter.ndim else Replicate()
            if id(parameter) not in known:
                known[id(parameter)] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]))
            setattr(module, name, known[id(parameter)])
    return net


LAYOUTS = {
    1: {"alone": alone, "fsdp": fsdp},
    2: {
        "replicas": replicas,
        "fsdp": fsdp,
        "hsdp-2x1": hsdp_of(2),
        "tensor-rows": tensor_rows,
        "tensor-columns": tensor_columns,
    },
    3: {
        "replicas": replicas,
        "fsdp-by-layer": fsdp_by_layer,
        "tensor-rows": tensor_rows,
        "tensor-columns": tensor_columns,
    },
    4: {
        "replicas": replicas,
        "fsdp-by-layer": fsdp_by_layer,
        "hsdp-2x2": hsdp_of(2),
        "tensor-rows": tensor_rows,
        "tensor-columns": tensor_columns,
        "fsdp-tensor-2x2-rows": fsdp_tensor_of(2, 0),
        "fsdp-tensor-2x2-columns": fsdp_tensor_of(2, 1),
        "fsdp-tensor-1x4-rows": fsdp_tensor_of(4, 0),
        "hsdp-tensor-1x2x2": hsdp_tensor,
    },
}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory that this rank holds of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters by the names that the bare network has."""
    for name, parameter in model.named_parameters():
        yield name.removeprefix("module."), parameter
