"""A trainer gets SIGKILL, again and again: what it had committed comes back, byte for byte."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trained import age, committed_steps, files_of, state_at

import ckptengine as ce
from ckptengine.inspect import verify

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
SEED = 20250917


def killed(kind: str, run: Path, *arguments: object) -> Any:
    command = [sys.executable, str(HERE / "kill_runs.py"), kind, str(run), *map(str, arguments)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_that_leftovers_go(run: Path, step: int) -> None:
    """Whoever works with the run next, and later, removes what the dead have left."""
    for _ in range(2):
        age(run)  # directories that are emptied in the first sweep are young again
        with ce.Checkpointer(run, keep_last=3) as checkpointer:
            step += 1
            assert checkpointer.restore(state_at(0)) == step - 1
            checkpointer.save(step, state_at(step))
    assert len(committed_steps(run)) == 3
    assert verify(run) == []
    data = re.compile(r"step-\d{8}/(manifest-\d{4,}\.json|data-[^/]+/(layout|rank-00000)\.zarr\.zip)")
    files = [name for name in files_of(run) if not re.fullmatch(r"generation-\d{4,}\.json", name)]
    odd = [name for name in files if not data.fullmatch(name) and not name.endswith("/lease.json")]
    assert odd == []
    assert len([name for name in files if not name.endswith("/lease.json")]) == 9, files
    assert len(list(run.glob("step-*"))) == 3


@pytest.mark.timeout(290)
def test_fifty_kills_at_random_moments_never_lose_a_committed_state(tmp_path: Path) -> None:
    run = tmp_path / "run"
    newest = killed("random", run, 50, SEED)["newest"]
    assert len(newest) == 50
    assert newest[-1] >= 50, "that was too little training to say anything"
    check_that_leftovers_go(run, newest[-1])


@pytest.mark.timeout(290)
def test_a_kill_before_or_within_any_disk_operation_never_loses_a_committed_state(folder: Path) -> None:
    result = killed("sweep", folder)
    assert result["lives"] > 60
    assert result["newest"] == [4, 5], "some of the kills come before the commit, some after it"
