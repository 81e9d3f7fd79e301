"""Which communicator a process uses unless it is given one."""

from __future__ import annotations

import os
import sys
from typing import Any

from ckptengine.comm.base import Communicator
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointError

__all__ = ["current", "place"]

# Set by torchrun, Open MPI, and MPICH and Slurm's PMI, in this order.

_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# One for the life of the process: what is cached for a communicator stays.
_alone = SingleProcess()


def current() -> Communicator:
    """Return the communicator of what is initialized: torch.distributed, else a single process.

    Raises `CheckpointError` where a launcher has started several ranks and nothing is initialized: each would
    take itself for the only one, and all would write the same checkpoint.
    """
    if _torch_group() is not None:
        from ckptengine.comm.torch import from_torch

        return from_torch()
    _refuse_several("`comm=`")
    return _alone


def place() -> tuple[int, int]:
    """Return the rank and the world size of what is initialized; exchanges nothing.

    Raises `CheckpointError` where `current` does.
    """
    dist = _torch_group()
    if dist is not None:
        return dist.get_rank(), dist.get_world_size()
    _refuse_several("`rank=` and `world_size=`")
    return _alone.rank, _alone.world_size


def _torch_group() -> Any:
    """Return the module torch.distributed where it is initialized, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _refuse_several(argument: str) -> None:
    for name in _WORLD_SIZES:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            raise CheckpointError(
                f"{name} is {value}, so this process is one of several ranks, but nothing is initialized by "
                "which they could coordinate: call torch.distributed.init_process_group first, or pass "
                f"{argument}, or unset {name} where this process works alone"
            )
