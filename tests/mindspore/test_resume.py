"""Trainings that are killed in the middle of an epoch, and started again, beside trainings that are not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
BATCHES, EPOCHS, EVERY = 7, 6, 3
KILLED_AT = 3 * BATCHES + 4
KINDS = ("Momentum", "Adam", "AdamWeightDecay")


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)


def steps(log):
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["PYNATIVE", "GRAPH"])
def test_a_training_killed_within_an_epoch_ends_as_if_it_had_not_been(mode, tmp_path):
    for life in range(len(KINDS) + 1):
        job = start(tmp_path, ROOT / "tests/mindspore/resume_job.py", tmp_path, mode)
        expected = 0 if life == len(KINDS) else -signal.SIGKILL
        assert job.returncode == expected, job.stdout[-2000:] + job.stderr[-6000:]
    for kind in KINDS:
        whole, killed = tmp_path / "whole" / kind, tmp_path / "killed" / kind
        one, other = (json.loads((place / "end.json").read_text()) for place in (whole, killed))
        assert one["start"] is None
        # The save of the step before the kill may have been in flight.
        assert other["start"] in (KILLED_AT - KILLED_AT % EVERY, KILLED_AT - KILLED_AT % EVERY - EVERY)
        assert one["contents"] == other["contents"]
        assert len(one["contents"]) > 12
        uninterrupted, course = steps(whole / "log"), steps(killed / "log")
        assert [step for step, _ in uninterrupted] == list(range(1, BATCHES * EPOCHS + 1))
        second_life = [step for step, _ in course[KILLED_AT:]]
        assert second_life == list(range(other["start"] + 1, BATCHES * EPOCHS + 1))
        assert set(course) == set(uninterrupted)
        assert len({digest for _, digest in uninterrupted}) == BATCHES * EPOCHS
