"""A text that every machine has: the source files of Python's standard library, as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["batch", "read"]


def read(limit: int = 4 << 20) -> Tensor:
    """Return the first `limit` bytes of the standard library's top-level modules, in order, as uint8."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def batch(
    text: Tensor, step: int, *, samples: int, length: int, seed: int, rank: int, world_size: int
) -> tuple[Tensor, Tensor]:
    """Return this rank's inputs and targets of one step, each int64 of (samples / world_size, length).

    The `samples` of a step depend on `seed` and `step` alone; the ranks split them in order. So the job
    trains on the same global batches at every world size, and after every restart.
    """
    if samples % world_size:
        raise ValueError(f"a global batch of {samples} samples does not split evenly over {world_size} ranks")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - length, (samples,), generator=generator)
    mine = starts.chunk(world_size)[rank]
    windows = torch.stack([text[start : start + length + 1] for start in mine.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]
