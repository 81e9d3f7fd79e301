"""Which communicator a process uses unless it is given one."""

from __future__ import annotations

import os
import sys

from ckptengine.comm.base import Communicator
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointError

__all__ = ["current"]

# Set by torchrun, Open MPI, MPICH and Slurm's PMI, and msrun, in this order.

_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MS_WORKER_NUM")

# One for the life of the process: what is cached for a communicator stays.
_alone = SingleProcess()


def current() -> Communicator:
    """Return the communicator of what is initialized: torch.distributed, MindSpore, else a single process.

    Raises `CheckpointError` where a launcher has started several ranks and nothing is initialized: each would
    take itself for the only one, and all would write the same checkpoint.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        from ckptengine.comm.torch import from_torch

        return from_torch()
    # Not by its name alone: the module is there while MindSpore is still being imported.
    communication = getattr(sys.modules.get("mindspore.communication"), "GlobalComm", None)
    if communication is not None and communication.INITED:
        from ckptengine.comm.mindspore import from_mindspore

        return from_mindspore()
    for name in _WORLD_SIZES:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            raise CheckpointError(
                f"{name} is {value}, so this process is one of several ranks, but nothing is initialized by "
                "which they could coordinate: call torch.distributed.init_process_group (MindSpore: "
                "mindspore.communication.init) first, or pass "
                f"`comm=`, or unset {name} where this process works alone"
            )
    return _alone
