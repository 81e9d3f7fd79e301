"""Which communicator a process uses unless it is given one."""

from __future__ import annotations

import os
import sys
from typing import Any

from ckptengine.comm.base import Communicator
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointError

__all__ = ["current", "place"]

# Set by torchrun; Open MPI; MPICH, Intel MPI and Slurm's PMI; Slurm for the tasks of one srun, whatever its PMI.
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

# One for the life of the process: what is cached for a communicator stays.
_alone = SingleProcess()


def current() -> Communicator:
    """Return the communicator of what is initialized: torch.distributed, else MPI (mpi4py), else a single process.

    Raises `CheckpointError` where a launcher has started several ranks and nothing is initialized: each would
    take itself for the only one, and all would write the same checkpoint.
    """
    if _torch_group() is not None:
        from ckptengine.comm.torch import from_torch

        return from_torch()
    mpi = _mpi()
    if _has_ranks(mpi):
        from ckptengine.comm.mpi import from_mpi

        return from_mpi()
    _refuse_several("`comm=`", mpi)
    return _alone


def place() -> tuple[int, int]:
    """Return the rank and the world size of what is initialized; exchanges nothing.

    Raises `CheckpointError` where `current` does.
    """
    dist = _torch_group()
    if dist is not None:
        return dist.get_rank(), dist.get_world_size()
    mpi = _mpi()
    if _has_ranks(mpi):
        return mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()
    _refuse_several("`rank=` and `world_size=`", mpi)
    return _alone.rank, _alone.world_size


def _torch_group() -> Any:
    """Return the module torch.distributed where it is initialized, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _mpi() -> Any:
    return sys.modules.get("mpi4py.MPI")


def _has_ranks(mpi: Any) -> bool:
    return bool(mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1)


def _refuse_several(argument: str, mpi: Any) -> None:
    for name in _WORLD_SIZES:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            unset = f"or pass {argument}, or unset {name} where this process works alone"
            raise CheckpointError(
                f"{name} is {value}, so this process is one of several ranks, {_advice(name, mpi)}{unset}"
            )


def _advice(name: str, mpi: Any) -> str:
    if name == "WORLD_SIZE":
        return (
            "but nothing is initialized by which they could coordinate: call "
            "torch.distributed.init_process_group first (under torchrun), "
        )
    if mpi is not None:
        return (
            "but mpi4py sees no other rank: MPI is not initialized or finalized already, or mpi4py has loaded another "
            f"MPI library than that of the launcher ({mpi.Get_library_version().splitlines()[0]:.60}): make them the "
            "same, "
        )
    return (
        "but nothing is initialized by which they could coordinate: for MPI, put `from mpi4py import MPI` at the top "
        "of the program (pip install 'ckptengine[mpi]'); with torch, call torch.distributed.init_process_group first; "
    )
