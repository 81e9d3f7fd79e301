"""Jobs of several real processes whose only storage is a bucket, and the commands that look at it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import zarr
from launch import ROOT, environment, launch
from ranks import run_ranks

import ckptengine as ce
import ckptengine.zarr
from ckptengine.catalog.listing import committed

JOB = str(Path(__file__).parent / "job.py")


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckptengine", command, *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_four_ranks_save_to_a_bucket_and_two_load_another_sharding(in_environment, tmp_path):
    url = f"{in_environment.url}/checkpoint"
    saved = launch(JOB, 4, tmp_path, url, "save")
    assert len(saved) == 4
    assert len([name for name in in_environment.names() if "rank-" in name]) == 4
    assert in_environment.uploads() == []
    assert launch(JOB, 2, tmp_path, url, "load") == [{"step": 5}] * 2
    found = ce.load(url, storage_options=in_environment.options)
    assert found["whole"][3, 4] == 3 * (3 * 517 + 4)
    group = ckptengine.zarr.open(url)
    assert isinstance(group["state/rows"], zarr.Array)
    assert np.array_equal(np.asarray(group["state/rows"][:]), found["rows"])


def test_a_rank_killed_in_its_upload_costs_one_step_and_its_parts_are_swept(in_environment, tmp_path):
    url = f"{in_environment.url}/run"
    job = run_ranks(2, JOB, tmp_path, url, "train")
    assert job.returncode == -signal.SIGKILL, job.stdout[-8000:]
    storage = in_environment.storage()
    assert [entry.step for entry in committed(storage)] == [1, 2]
    assert in_environment.uploads() != []
    again = launch(JOB, 2, tmp_path, url, "train")
    assert [report["restored"] for report in again] == [2, 2]
    assert [report["committed"] for report in again] == [[3, 4, 5]] * 2
    assert in_environment.uploads() == []
    names = in_environment.names()
    assert len({name.split("/")[2] for name in names if "/data-" in name}) == len(committed(storage))


def test_the_commands_look_into_a_bucket(in_environment, call):
    url = f"{in_environment.url}/run"
    state = {"w": np.arange(100_000.0), "step": 1}
    with ce.Checkpointer(url, every=1, keep_last=2, storage_options=in_environment.options) as ckpt:
        for step in (1, 2, 3):
            ckpt.step(step, state)
    listed = run("ls", url, "--json")
    assert [one["step"] for one in json.loads(listed.stdout)] == [2, 3], listed.stderr
    shown = call("show", url)
    assert shown.exit_code == 0, shown.output
    assert "w" in shown.output
    assert call("verify", url).exit_code == 0
    name = next(name for name in in_environment.names() if "00000003" in name and "rank-" in name)
    data = bytearray(in_environment.fs.cat_file(f"{in_environment.url}/{name}"))
    data[len(data) // 2] ^= 1
    in_environment.fs.pipe_file(f"{in_environment.url}/{name}", bytes(data))
    assert call("verify", url).exit_code == 1
    audited = call("audit", url)
    assert audited.exit_code == 2
    assert "no data cursor" in audited.output
