"""A text that every machine has: the source files of Python's standard library, as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Windows"]


class Windows(Dataset[Tensor]):
    """The first `count` windows of the standard library's top-level modules, one after the other.

    Each is an int64 tensor of `length + 1` bytes: inputs, and targets one further.
    """

    def __init__(self, count: int, length: int) -> None:
        self._count, self._length = count, length
        wanted = count * length + 1
        text = bytearray()
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text += path.read_bytes()
            if len(text) >= wanted:
                break
        if len(text) < wanted:
            raise ValueError(f"the standard library has {len(text)} bytes, {count} windows of {length} need {wanted}")
        self._text = torch.frombuffer(text[:wanted], dtype=torch.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._length
        return self._text[start : start + self._length + 1].long()
