"""Ranks without a key-value store of their own: their tiers' messages go through the run's place."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpirun import HERE, mpirun, reports

from ckptengine.catalog.listing import committed
from ckptengine.storage.local import LocalStorage
from ckptengine.tiers.memory import memory_root

JOB = "mpi_tiers_job.py"


@pytest.fixture
def memory() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"ckptengine-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def steps(folder: Path | str) -> list[int | None]:
    return [entry.step for entry in committed(LocalStorage(folder))]


@pytest.mark.parametrize("nodes", [False, True])
def test_under_mpiexec_a_job_with_tiers_ends_with_its_newest_checkpoint_in_the_runs_place(tmp_path, memory, nodes):
    options = {"local": str(tmp_path / "local"), "memory": str(memory), "until": 3, "nodes": nodes}
    found = reports(2, JOB, tmp_path, json.dumps(options))
    assert [report["restored"] for report in found] == [None, None]
    assert found[0]["uploaded"] == 3
    assert steps(tmp_path / "run")[-1] == 3
    assert not list(tmp_path.rglob("moves-*"))
    assert [path.name for path in memory.rglob("*") if not path.name.startswith("node-")] == []


@pytest.mark.parametrize(("local", "nodes"), [(False, False), (True, False), (True, True)])
def test_under_mpiexec_killed_ranks_resume_from_memory_and_the_step_comes_to_the_runs_place(
    tmp_path, memory, local, nodes
):
    options = {"local": str(tmp_path / "local") if local else None, "memory": str(memory), "nodes": nodes}
    assert mpirun(2, HERE / JOB, tmp_path, json.dumps(options | {"until": 3, "dies_at": 3})).returncode != 0
    run = tmp_path / "run"
    assert 3 not in steps(run)
    assert steps(memory_root(str(run), memory / "node-0" if nodes else memory))[-1] == 3
    found = reports(2, JOB, tmp_path, json.dumps(options | {"until": 3}))
    assert [report["restored"] for report in found] == [3, 3]
    assert steps(run)[-1] == 3
