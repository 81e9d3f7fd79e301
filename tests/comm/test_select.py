"""Which communicator is used unless one is given."""

import pytest

from ckptengine.comm.select import current
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointError

LAUNCHERS = ("WORLD_SIZE", "MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_a_plain_process_is_alone():
    assert isinstance(current(), SingleProcess)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ranks_that_cannot_coordinate_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "4")
    with pytest.raises(CheckpointError, match="nothing is initialized"):
        current()


def test_a_world_of_one_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(current(), SingleProcess)


@pytest.mark.parametrize("name", LAUNCHERS[2:])
def test_ranks_that_mpiexec_or_srun_started_are_told_how_to_choose_mpi(name, monkeypatch):
    monkeypatch.setenv(name, "4")
    with pytest.raises(CheckpointError, match=rf"{name} is 4, .*from mpi4py import MPI.*pip install mpi4py"):
        current()
