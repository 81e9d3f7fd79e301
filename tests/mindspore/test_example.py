"""The example as a user starts it: again and again, and trained for so many epochs in all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "mindspore_resume.py"


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    command = [sys.executable, str(EXAMPLE), str(folder), *arguments]
    job = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=200)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-6000:]
    return len(re.findall(r"^epoch: ", job.stdout, re.MULTILINE)), float(job.stdout.rpartition("accuracy ")[2])


def test_the_services_script_trains_the_epochs_that_are_left_and_takes_the_newest_by_number(tmp_path):
    folder = tmp_path / "run"
    assert start(folder, "--epochs", "10")[0] == 10 * 14
    # Without the zeros in front, the ninth would be the last by name, and two epochs would be trained.
    steps, accuracy = start(folder, "--epochs", "11")
    assert steps == 14
    assert accuracy > 0.9
    assert sorted(os.listdir(folder)) == [f"digits-{epoch:06d}_000014.ckpt" for epoch in range(1, 12)]


def test_two_lines_with_resume_train_the_same_epochs_however_often_it_is_started(tmp_path):
    folder = tmp_path / "run"
    assert start(folder, "--epochs", "2", "--resume", "--graph")[0] == 2 * 14
    steps, accuracy = start(folder, "--epochs", "3", "--resume", "--graph")
    assert steps == 14
    assert accuracy > 0.9
