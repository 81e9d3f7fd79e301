"""How the processes of a job with tiers end."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiered import Running, finish

from ckptengine.catalog.listing import committed
from ckptengine.storage.local import LocalStorage


@pytest.fixture
def memory() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"ckptengine-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_ranks_that_leave_with_a_code_of_their_own_end_with_that_code(tmp_path, memory):
    places = {"run": str(tmp_path / "run"), "local": str(tmp_path / "local"), "memory": str(memory)}
    with Running(3, tmp_path, **places, until=2, exit=75) as job:
        assert job.job.wait(120) == 75


def test_ranks_that_are_told_to_end_bring_their_last_step_home_and_end_with_the_code_for_a_restart(tmp_path, memory):
    run = tmp_path / "run"
    places = {"run": str(run), "local": str(tmp_path / "local"), "memory": str(memory)}
    with Running(3, tmp_path, **places, until=100_000, signal_at=3) as job:
        assert job.job.wait(120) == 75
        output = job.job.printed()
    last = committed(LocalStorage(run))[-1].step
    assert f"step {last} is saved; exiting with code 75" in output
    assert last is not None
    assert [report["restored"] for report in finish(3, tmp_path, **places, until=last)] == [last] * 3


def test_a_job_that_never_closes_its_checkpointer_ends_well(tmp_path, memory):
    places = {"run": str(tmp_path / "run"), "local": str(tmp_path / "local"), "memory": str(memory)}
    reports = finish(3, tmp_path, **places, until=2, unclosed=True)
    assert [report["restored"] for report in reports] == [None] * 3
    assert [report["restored"] for report in finish(3, tmp_path, **places, until=2)] == [2] * 3


def test_a_rank_whose_node_has_no_shared_memory_is_named_on_all_ranks(tmp_path, memory):
    disk = tmp_path / "on a disk"
    disk.mkdir()
    with Running(2, tmp_path, run=str(tmp_path / "run"), memory=[str(memory), str(disk)], until=1) as job:
        assert job.job.wait(120) != 0
        output = job.job.printed()
    assert "/run failed on rank(s) 1" in output
    assert "not on a tmpfs" in output
