"""SHA-256 of every leaf of a training state, taken from the whole tensors and not through the engine."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["file_name", "leaf_digests", "write"]


def leaf_digests(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> dict[str, str]:
    """Return leaf name -> digest of dtype, shape and bytes. All ranks must call it: shards are gathered."""
    digests = {f"model.{name}": _tensor(value) for name, value in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            digests[f"optimizer.{names[parameter]}.{key}"] = _tensor(value)
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                digests[f"optimizer.param_groups.{number}.{key}"] = _value(value)
    for key, value in scheduler.state_dict().items():
        digests[f"scheduler.{key}"] = _value(value)
    return digests


def file_name(when: str, step: int, world_size: int) -> str:
    """Return the name of a digest file: `when` is `saved` or `restored`."""
    return f"{when}-step-{step:08d}-world-{world_size}.json"


def write(folder: Path, when: str, step: int, digests: dict[str, str]) -> None:
    """Write the digests, on rank 0, so that a file is there whole or not at all."""
    if dist.get_rank() == 0:
        path = folder / file_name(when, step, dist.get_world_size())
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(digests, indent=1))
        os.replace(partial, path)


def _tensor(value: Tensor) -> str:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    whole = whole.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)} ".encode())
    digest.update(whole.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _value(value: Any) -> str:
    return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).hexdigest()
