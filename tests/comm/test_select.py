"""Which communicator is used unless one is given."""

import pytest

from ckptengine.comm.select import current
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MS_WORKER_NUM"):
        monkeypatch.delenv(name, raising=False)


def test_a_plain_process_is_alone():
    assert isinstance(current(), SingleProcess)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MS_WORKER_NUM"])
def test_ranks_that_cannot_coordinate_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "4")
    with pytest.raises(CheckpointError, match="init_process_group"):
        current()


def test_a_world_of_one_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(current(), SingleProcess)
