"""Models and states that the tests of other libraries' checkpoints save with those libraries."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn


def model(seed: int = 0) -> nn.Sequential:
    """Return a small model with parameters, buffers of two types, and sizes that no number of ranks divides."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(37, 50), nn.BatchNorm1d(50), nn.Linear(50, 11, bias=False), nn.Embedding(13, 5))


def same(one: Any, other: Any, where: str = "") -> None:
    """Compare two states to the bit, with their types and the order of their keys."""
    if isinstance(other, torch.Tensor):
        assert isinstance(one, torch.Tensor), where
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        assert torch.equal(*raw), where
    elif isinstance(other, dict):
        assert set(one) == set(other), where
        for key, item in other.items():
            same(one[key], item, f"{where}.{key}")
    elif isinstance(other, list | tuple | deque):
        assert type(one) is type(other), where
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{where}.{number}")
    else:
        assert type(one) is type(other), where
        assert one == other, where
