"""The example of docs/mpi.md, killed and restarted on other numbers of ranks."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mpirun import ROOT, command, environment, mpirun

import ckptengine as ce

pytestmark = pytest.mark.long

SCRIPT = ROOT / "examples" / "heat_mpi.py"
STEPS = 600


def ranks_of(job: subprocess.Popen) -> list[int]:
    """Return the process numbers of a job's ranks."""
    children = [Path(f"/proc/{job.pid}/task/{task.name}/children") for task in Path(f"/proc/{job.pid}/task").iterdir()]
    return [int(number) for path in children for number in path.read_text().split()]


def test_a_plate_that_was_killed_and_went_on_on_other_ranks_is_the_same_to_the_last_bit(tmp_path):
    one = mpirun(1, SCRIPT, tmp_path / "one", STEPS)
    assert one.returncode == 0, one.stderr

    job = subprocess.Popen(command(4, SCRIPT, tmp_path / "many", STEPS), env=environment())
    deadline = time.monotonic() + 200
    while not list((tmp_path / "many").glob("step-*/manifest-*.json")):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks = ranks_of(job)
    assert len(ranks) == 4
    os.kill(ranks[2], signal.SIGKILL)
    assert job.wait(60) == 128 + signal.SIGKILL

    again = mpirun(6, SCRIPT, tmp_path / "many", STEPS)
    assert again.returncode == 0, again.stderr
    (resumed,) = re.findall(r"resumed at step (\d+) on 6 ranks", again.stdout)
    assert 0 < int(resumed) < STEPS
    expected, found = ce.load(tmp_path / "one"), ce.load(tmp_path / "many")
    assert found["plate"].tobytes() == expected["plate"].tobytes()
    assert one.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]
    # Another life finds nothing left to do, and all of its ranks the same plate.
    last = mpirun(3, SCRIPT, tmp_path / "many", STEPS)
    assert f"resumed at step {STEPS} on 3 ranks" in last.stdout
    assert last.stdout.splitlines()[-1] == one.stdout.splitlines()[-1]
