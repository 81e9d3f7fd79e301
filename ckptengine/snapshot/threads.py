"""How many threads copy: a node's cores are shared by its ranks, however they were started."""

from __future__ import annotations

import os

__all__ = ["copy_threads"]

_MOST = 8

# Set for each rank by torchrun; Open MPI (docs.open-mpi.org, "Environment variables set for MPI applications"); MPICH
# and Intel MPI (Hydra); MVAPICH2. What starts the ranks themselves comes first: torchrun may be under srun.
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")

_MSRUN_LOCAL_RANKS = 8
"""msrun's default for `--local_worker_num`."""


def copy_threads() -> int:
    """Return how many threads copy: `CKPTENGINE_THREADS`, else this rank's share of the node's cores, at most 8.

    More than a few threads saturate the memory of one socket, and the ranks of a node share it. The share is an equal
    part of the cores that the launcher has, and never more than this process may run on: a rank that was bound to
    cores of its own has those, not a part of them.
    """
    given = os.environ.get("CKPTENGINE_THREADS")
    if given:
        return max(1, int(given))
    own = len(os.sched_getaffinity(0))
    return max(1, min(_MOST, own, max(own, _launcher_cores()) // _local_ranks()))


def _launcher_cores() -> int:
    """Return how many cores the process may use that started this one, 0 where that can't be known."""
    parent = os.getppid()
    if parent == 0:  # in another process namespace
        return 0
    try:
        return len(os.sched_getaffinity(parent))
    except OSError:  # it has ended, or may not be looked at
        return 0


def _local_ranks() -> int:
    """Return how many ranks of this job the node has, as far as its launcher tells; 1 where there is none."""
    for name in _LOCAL_RANKS:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    workers = os.environ.get("MS_WORKER_NUM", "")
    if workers.isdigit() and int(workers) > 0:
        # msrun tells how many workers there are in all, and the address of the scheduler's node.
        alone = os.environ.get("MS_SCHED_HOST") in ("127.0.0.1", "localhost")
        return int(workers) if alone else min(int(workers), _MSRUN_LOCAL_RANKS)
    return _slurm_local_ranks() or 1


def _slurm_local_ranks() -> int:
    """Return how many tasks of srun's step this node has, 0 where there is no step or it does not say.

    `SLURM_STEP_TASKS_PER_NODE` has the nodes' numbers in the order of `SLURM_NODEID`, "2(x3),1" for 2, 2, 2 and 1
    (srun(1), output environment variables). Without `STEP` it is sbatch's, whose script is one process.
    """
    node = os.environ.get("SLURM_NODEID", "")
    if not node.isdigit():
        return 0
    left = int(node)
    for item in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        tasks, _, repeated = item.partition("(x")
        times = repeated.removesuffix(")") or "1"
        if not tasks.isdigit() or not times.isdigit():
            return 0
        if left < int(times):
            return int(tasks)
        left -= int(times)
    return 0
