"""Ranks of a node share its cores when they copy, whatever has started them."""

import os
import subprocess
import sys

import pytest
from mpirun import MPIEXEC, environment

from ckptengine.snapshot.threads import _LOCAL_RANKS, copy_threads

ALL = (*_LOCAL_RANKS, "CKPTENGINE_THREADS", "MS_WORKER_NUM", "MS_SCHED_HOST", "SLURM_STEP_TASKS_PER_NODE")


def test_ranks_under_mpiexec_share_the_cores_of_their_node():
    program = "from ckptengine.snapshot.threads import copy_threads; print(copy_threads())"
    start = [MPIEXEC, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, "-c"]
    env = {name: value for name, value in environment().items() if name not in ALL}
    job = subprocess.run([*start, program], env=env, capture_output=True, text=True, timeout=60)
    assert job.returncode == 0, job.stderr
    share = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    assert job.stdout.split() == [str(share)] * 2


@pytest.fixture
def pretended_node(monkeypatch):
    """Pretend a node of other size than this one: the cores of this process, and of its launcher."""

    def pretend(own, launcher, **env):
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(launcher if process else own)))
        monkeypatch.setattr(os, "getppid", lambda: 1 << 30)
        return copy_threads()

    return pretend


@pytest.mark.parametrize(
    ("env", "share"),
    [
        ({}, 8),
        ({"CKPTENGINE_THREADS": "11", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 11),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 6),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "48"}, 1),
        ({"MPI_LOCALNRANKS": "8"}, 3),
        ({"MV2_COMM_WORLD_LOCAL_SIZE": "12"}, 2),
        # torchrun under srun: the step has one task per node.
        ({"LOCAL_WORLD_SIZE": "6", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}, 4),
        ({"MS_WORKER_NUM": "12", "MS_SCHED_HOST": "127.0.0.1"}, 2),
        ({"MS_WORKER_NUM": "4", "MS_SCHED_HOST": "10.0.0.7"}, 6),
        ({"MS_WORKER_NUM": "512", "MS_SCHED_HOST": "10.0.0.7"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),4,12", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),4,12", "SLURM_NODEID": "3"}, 6),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),4,12", "SLURM_NODEID": "4"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "unknown", "SLURM_NODEID": "0"}, 8),
    ],
)
def test_what_each_launcher_tells_of_its_node_gives_a_ranks_share_of_24_cores(pretended_node, env, share):
    assert pretended_node(24, 24, **env) == share


def test_a_rank_that_is_bound_to_cores_of_its_own_uses_those_and_not_a_part_of_them(pretended_node):
    assert pretended_node(4, 32, OMPI_COMM_WORLD_LOCAL_SIZE="8") == 4
    assert pretended_node(1, 32, OMPI_COMM_WORLD_LOCAL_SIZE="8") == 1
    # Four ranks on each of two sockets, bound to the socket.
    assert pretended_node(16, 32, OMPI_COMM_WORLD_LOCAL_SIZE="8") == 4
    # The launcher itself was confined: its 8 cores are for all.
    assert pretended_node(8, 8, OMPI_COMM_WORLD_LOCAL_SIZE="4") == 2
