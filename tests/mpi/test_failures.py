"""Ranks that die under mpiexec: what the others see, and what the next start finds."""

import json
import tempfile
from pathlib import Path

import pytest
from in_memory import IN_MEMORY
from mpirun import HERE, mpirun

SCRIPT = HERE / "kill_job.py"


@pytest.fixture(scope="module")
def folder():
    """A folder in memory: each save has 5 seconds."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def survivors(folder):
    """The reports of the ranks that Open MPI left alive when rank 2, and then rank 3, was killed."""
    (folder / "recovery").mkdir()
    job = mpirun(4, SCRIPT, folder / "recovery", "die", options=("--enable-recovery",))
    found = {rank: folder / "recovery" / f"rank-{rank}.json" for rank in range(4)}
    assert [rank for rank, path in found.items() if path.exists()] == [0, 1], job.stdout + job.stderr
    return [json.loads(found[rank].read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ended(folder):
    """A job that Open MPI ended, as it does by default, when rank 2 was killed."""
    (folder / "default").mkdir()
    return mpirun(4, SCRIPT, folder / "default", "die")


def test_a_rank_killed_during_a_save_is_named_on_the_others_within_the_deadline(survivors):
    for report in survivors:
        kind, text, seconds = report["save"]
        assert kind == "DeadlineError"
        assert "rank 2 did not report in time" in text
        assert seconds < 5.0 + 15.0  # the timeout of that job, and room for a busy machine
        kind, text, _ = report["next meeting"]
        assert kind == "DeadlineError"
        assert "rank 2 did not come" in text


def test_a_rank_killed_within_an_operation_is_named_by_it_and_by_every_later_one(survivors):
    for report in survivors:
        for name in ("within", "afterwards"):
            kind, text, seconds = report[name]
            assert kind == "DeadlineError"
            assert "rank 2 did not come within 3 s" in text  # rank 3 of the job is number 2 of those that are left
            assert seconds < 15.0


def test_when_rank_0_is_killed_which_hosts_the_store_the_others_are_told_so_at_once(folder):
    (folder / "leader").mkdir()
    job = mpirun(3, SCRIPT, folder / "leader", "leader", options=("--enable-recovery",))
    found = {rank: folder / "leader" / f"rank-{rank}.json" for rank in range(3)}
    assert [rank for rank, path in found.items() if path.exists()] == [1, 2], job.stdout + job.stderr
    for rank in (1, 2):
        report = json.loads(found[rank].read_text())
        for name in ("save", "next save", "next meeting"):
            kind, text, seconds = report[name]
            assert kind == "RankFailedError"
            assert "which rank 0 hosts, can't be reached" in text
            assert seconds < 30.0  # of the 60 that each had


def test_by_default_the_whole_job_ends_with_the_rank(ended, folder):
    assert ended.returncode == 128 + 9
    assert "rank 2" in ended.stderr
    assert "signal 9" in ended.stderr
    assert not list((folder / "default").glob("rank-*.json"))


def test_the_next_start_on_another_number_of_ranks_finds_the_last_good_step(survivors, ended, folder):
    job = mpirun(3, SCRIPT, folder, "restart")
    assert job.returncode == 0, job.stdout + job.stderr
    assert len(list(folder.glob("*/run/step-00000002/manifest-0002.json"))) == len(list(folder.glob("*/run"))) >= 2


def test_an_uncaught_error_on_one_rank_ends_the_job_at_once(tmp_path):
    job = mpirun(3, SCRIPT, tmp_path, "raise")  # the other ranks would wait for 10 minutes
    assert job.returncode == 1
    assert "RuntimeError: the input of rank 1 is missing" in job.stderr
