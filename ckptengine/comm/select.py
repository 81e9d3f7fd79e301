"""Which communicator a process uses unless it is given one."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from ckptengine.comm.base import Communicator
from ckptengine.comm.single import ALONE
from ckptengine.errors import CheckpointError

__all__ = ["current", "join", "place"]

# Set by torchrun; msrun; Open MPI; MPICH, Intel MPI and Slurm's PMI; Slurm for the tasks of one srun, whatever its PMI.
_WORLD_SIZES = ("WORLD_SIZE", "MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def current(timeout: float = 600.0) -> Communicator:
    """Return the communicator of what is initialized: torch.distributed, MindSpore, MPI (mpi4py), or one process alone.

    At the first call the ranks meet, for which none waits longer than `timeout` seconds: then it raises `DeadlineError`
    naming those that did not come.

    Raises `CheckpointError` where a launcher has started several ranks and nothing is initialized: each would
    take itself for the only one, and all would write the same checkpoint.
    """
    match _initialized():
        case "torch":
            from ckptengine.comm.torch import from_torch

            return from_torch(timeout)
        case "mindspore":
            from ckptengine.comm.mindspore import from_mindspore

            return from_mindspore(timeout)
        case "mpi":
            from ckptengine.comm.mpi import from_mpi

            return from_mpi(timeout=timeout)
    _refuse_several("`comm=`")
    return ALONE


def join(timeout: float = 600.0) -> Communicator:
    """Return the communicator of the job that a launcher has started this process in, for a program that has no other
    use for it: what nobody has initialized is initialized, torch's process group under torchrun, else MPI.

    Raises as `current`, and `ModuleNotFoundError` where torch or mpi4py is not installed.
    """
    if _initialized() is None:
        launcher = next((name for name in _WORLD_SIZES if (os.environ.get(name) or "1") != "1"), None)
        if launcher == "WORLD_SIZE":
            from ckptengine.comm.torch import join_job

            join_job(timeout)
        elif launcher not in (None, "MS_WORKER_NUM"):
            import ckptengine.comm.mpi  # noqa: F401 (mpi4py initializes MPI as it is imported)
    return current(timeout)


def place() -> tuple[int, int]:
    """Return the rank and the world size of what is initialized; exchanges nothing.

    Raises `CheckpointError` where `current` does.
    """
    match _initialized():
        case "torch":
            dist = sys.modules["torch.distributed"]
            return dist.get_rank(), dist.get_world_size()
        case "mindspore":
            communication = sys.modules["mindspore.communication"]
            return communication.get_rank(), communication.get_group_size()
        case "mpi":
            world = sys.modules["mpi4py.MPI"].COMM_WORLD
            return world.Get_rank(), world.Get_size()
    _refuse_several("`rank=` and `world_size=`")
    return ALONE.rank, ALONE.world_size


def _initialized() -> Literal["torch", "mindspore", "mpi"] | None:
    """Return by what the ranks of the job can talk, None where there is nothing or only one rank in MPI's world."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return "torch"
    # Not by the module alone: it is there while MindSpore is still being imported.
    group = getattr(sys.modules.get("mindspore.communication"), "GlobalComm", None)
    if group is not None and group.INITED:
        return "mindspore"
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
        return "mpi"
    return None


def _refuse_several(argument: str) -> None:
    for name in _WORLD_SIZES:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            unset = f"or pass {argument}, or unset {name} where this process works alone"
            raise CheckpointError(
                f"{name} is {value}, so this process is one of several ranks, {_advice(name)}, {unset}"
            )


def _advice(name: str) -> str:
    nothing = "but nothing is initialized by which they could coordinate"
    if name == "WORLD_SIZE":
        return f"{nothing}: call torch.distributed.init_process_group first (under torchrun)"
    if name == "MS_WORKER_NUM":
        return f"{nothing}: call mindspore.communication.init first (under msrun)"
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        return (
            "but mpi4py sees no other rank: MPI is not initialized, or finalized already, or mpi4py has loaded another "
            f"library ({mpi.Get_library_version().splitlines()[0]:.60}) than the launcher's: make them the same"
        )
    return (
        f"{nothing}: for MPI, put `from mpi4py import MPI` at the top of the program (pip install mpi4py); "
        "with torch, call torch.distributed.init_process_group first"
    )
