"""One network of odd sizes under FSDP1, ZeRO, FSDP2, and whole; each with an optimizer of two groups where it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffload,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

Built = tuple[nn.Module, torch.optim.Optimizer]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Linear(13, 7, bias=False)


class Net(nn.Module):
    """Fewer rows than ranks, one element, four dimensions in another memory order, a tied weight, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv2d(3, 5, (2, 3)).to(memory_format=torch.channels_last)
        self.low = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight


def network(seed: int) -> Net:
    """Return the network with random parameters and buffers."""
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(seed))
    return net


def _adamw(
    model: nn.Module, kind: Any = torch.optim.AdamW, one_group: bool = False, **more: Any
) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    flat = one_group or any("_flat_param" in name for name, _ in named)
    vectors = [p for name, p in named if "norm" in name or "scale" in name]
    others = [p for name, p in named if not ("norm" in name or "scale" in name)]
    groups = [{"params": [p for _, p in named]}] if flat else [{"params": vectors, "lr": 0.003}, {"params": others}]
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.01, amsgrad=True, foreach=False, **more)
    return optimizer


def _fsdp1(original: bool, **more: Any) -> Callable[[Net], Built]:
    def build(net: Net) -> Built:
        def wrap(part: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(part, device_id=torch.device("cpu"), use_orig_params=original, **more)

        net.low = wrap(net.low)
        for number, block in enumerate(net.blocks):
            if original:
                block.up = wrap(block.up)  # a unit in a unit
            net.blocks[number] = wrap(block)
        model = wrap(net)
        return model, _adamw(model)

    return build


def _zero(**more: Any) -> Callable[[Net], Built]:
    def build(net: Net) -> Built:
        model = DistributedDataParallel(net)
        return model, _adamw(model, ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, **more)

    return build


def _fsdp2(net: Net, one_group: bool = False) -> Built:
    net.conv.to(memory_format=torch.contiguous_format)  # it takes no others
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    return net, _adamw(net, one_group=one_group)


def _whole(net: Net, one_group: bool = False) -> Built:
    return net, _adamw(net, one_group=one_group)


LAYOUTS: dict[str, Callable[[Net], Built]] = {
    "fsdp1": _fsdp1(False),
    "fsdp1-orig": _fsdp1(True),
    "fsdp1-grad-op": _fsdp1(False, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "fsdp1-no-shard": _fsdp1(True, sharding_strategy=ShardingStrategy.NO_SHARD),
    "fsdp1-mixed": _fsdp1(True, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)),
    "fsdp1-offload": _fsdp1(False, cpu_offload=CPUOffload(offload_params=True)),
    "zero": _zero(parameters_as_bucket_view=False),
    "zero-buckets": _zero(parameters_as_bucket_view=True),
    "fsdp2": _fsdp2,
    "fsdp2-1": partial(_fsdp2, one_group=True),
    "whole": _whole,
    "whole-1": partial(_whole, one_group=True),
}


def groups_of(layout: str) -> int:
    """Return how many groups the optimizer has: flat parameters can't be in two."""
    return 1 if layout in ("fsdp1", "fsdp1-grad-op", "fsdp1-offload", "fsdp2-1", "whole-1") else 2


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    """Take steps with gradients that are a function of each element alone; where there is padding, it is 0."""
    for _ in range(count):
        for parameter in model.parameters():
            if not parameter.numel() and not hasattr(parameter, "placements"):
                continue  # FSDP1 leaves the gradient of what a rank has nothing of at None
            with torch.no_grad():
                value = parameter.detach()
                parameter.grad = value * 0.5 + 0.25 * value.sign().abs()
        optimizer.step()


def local_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what this rank holds, in the forms and under the names that torch itself keeps it."""
    named = dict(model.named_parameters())
    yield from ((f"param {name}", _local(p)) for name, p in named.items())
    yield from ((f"buffer {name}", buffer) for name, buffer in model.named_buffers())
    state = getattr(optimizer, "optim", optimizer).state
    for name, parameter in named.items():
        for key, value in state.get(parameter, {}).items():
            yield f"{key} {name}", _local(value)


def _local(tensor: Any) -> torch.Tensor:
    tensor = tensor.detach()
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
