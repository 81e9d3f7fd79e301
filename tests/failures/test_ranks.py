"""Two real ranks, of which one fails, or dies, in a save."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forkserver import fork
from in_memory import IN_MEMORY
from ranks import run_ranks
from trained import age

import ckptengine as ce
from ckptengine.inspect import list_run, verify

pytest.importorskip("torch")
HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[1, 0], ids=["rank1", "rank0"])
def jobs(request: pytest.FixtureRequest) -> Iterator[tuple[int, Path]]:
    """The folder of two jobs; in the first one the victim fails in several ways and is killed.

    It is in memory: each save has 5 seconds.
    """
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        folder = Path(name)
        with (folder / "output.txt").open("wb") as output:
            job = fork([str(HERE / "kill_ranks.py"), str(folder), str(request.param)], stdout=output, stderr=output)
        try:
            assert job.wait(200) == 0, (folder / "output.txt").read_text()[-8000:]
        finally:
            job.kill()
        yield request.param, folder


def said(folder: Path, job: int, rank: int) -> Any:
    return json.loads((folder / f"job-{job}-rank-{rank}.json").read_text())


def test_a_rank_that_dies_in_a_save_is_named_within_the_deadline(jobs: tuple[int, Path]) -> None:
    victim, folder = jobs
    last = said(folder, 0, 1 - victim)[-1]
    assert last["kind"] in ("SaveFailedError", "DeadlineError")
    assert f"rank {victim} " in last["text"]
    assert last["seconds"] < 60, "a timeout of 5 s must not become minutes"


def test_a_rank_without_memory_at_the_first_save_does_not_mispair_the_ranks(jobs: tuple[int, Path]) -> None:
    victim, folder = jobs
    first, second, *_ = said(folder, 0, 1 - victim)
    assert first["kind"] == "SaveFailedError"
    assert f"rank {victim}: [Errno 12] no memory for the snapshot" in first["text"]
    assert second["kind"] == "", second["text"]


def test_a_rank_that_cannot_write_fails_the_save_and_the_next_one_succeeds(jobs: tuple[int, Path]) -> None:
    victim, folder = jobs
    _, _, failed, after, _ = said(folder, 0, 1 - victim)
    assert failed["kind"] == "SaveFailedError"
    assert f"rank {victim}: [Errno 5] cannot write {folder}" in failed["text"]
    assert f"rank-{victim:05d}.zarr.zip" in failed["text"]
    assert after["kind"] == "", after["text"]


def test_the_next_job_restores_the_last_commit_and_saves_the_lost_step(jobs: tuple[int, Path]) -> None:
    _, folder = jobs
    for rank in range(2):
        restored, again = said(folder, 1, rank)
        assert restored == {"restored": 4}
        assert again["kind"] == "", again["text"]
    assert [summary.step for summary in list_run(folder / "run")] == [2, 4, 5]
    assert verify(folder / "run") == []
    loaded = ce.load(folder / "run")
    assert loaded["step"] == 5
    assert np.array_equal(loaded["half"], np.arange(6000, dtype=np.float32) * 5)


def test_nothing_of_failed_and_killed_attempts_stays(jobs: tuple[int, Path]) -> None:
    victim, folder = jobs
    run = folder / "run"
    # Where rank 0 lived, it can't know that the other one won't write any more: time tells.
    assert len(json.loads((folder / "left.json").read_text())) == 1
    # Where rank 0 died, its lease tells at once, unless it died before it had one.
    assert len(list(run.glob("step-00000005/data-*"))) in ((2,) if victim == 1 else (1, 2))
    age(run)
    ce.Checkpointer(run).close()
    steps = sorted(path.name for path in run.glob("step-*"))
    assert steps == ["step-00000002", "step-00000004", "step-00000005"]
    for step in steps:
        assert len(list((run / step).glob("data-*"))) == 1
    assert verify(run) == []


@pytest.mark.parametrize(("skipper", "torchrun"), [(1, True), (0, False)])
def test_a_rank_that_leaves_a_save_out_is_named_and_the_next_save_is_made(tmp_path, skipper, torchrun) -> None:
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
        command += [str(HERE / "left_out_job.py"), str(tmp_path), str(skipper)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    else:
        job = run_ranks(3, HERE / "left_out_job.py", tmp_path, skipper)
        assert job.returncode == 0, job.stdout[-8000:]
    for rank in range(3):
        ends = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [ends[step][0] for step in "1345"] == ["", "", "", ""]
        # It is told when the rank comes to the next save, and not when the time is up.
        assert ends["3"][1] < 100
        if rank != skipper:
            assert f"rank {skipper}: it has left step-00000002 out" in ends["2"][0]
    assert [entry.step for entry in list_run(tmp_path / "run")] == [1, 3, 4, 5]
    assert verify(tmp_path / "run") == []
