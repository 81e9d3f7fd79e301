import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from buckets import Bucket
from cli_run import Call
from launch import environment

import ckptengine as ce
from ckptengine.catalog.lease import LEASE_SECONDS, Lease
from ckptengine.storage.local import LocalStorage

DEAD = "step-00000040/data-deaddeaddead-1"

KILLED = """
import os, pathlib, signal, sys, time
import numpy as np
import ckptengine as ce
from ckptengine.storage.local import LocalArchiveWriter
def killed(self):
    while not list(pathlib.Path(sys.argv[1]).glob("step-*40/data-*/lease.json")):  # another thread writes it
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
LocalArchiveWriter.finish = killed
with ce.Checkpointer(sys.argv[1], every=1, preemption=None) as ckpt:
    ckpt.save(40, {"w": np.zeros(1 << 20)})
"""


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def make_old(folder: Path) -> None:
    """Set all times back beyond every lease."""
    for path in folder.rglob("*"):
        then = path.stat().st_mtime - LEASE_SECONDS - 60
        os.utime(path, (then, then))


@pytest.fixture
def killed(run: Path) -> Path:
    """The run after a job that was killed in its save."""
    job = subprocess.run([sys.executable, "-c", KILLED, str(run)], env=environment(), check=False, timeout=60)
    assert job.returncode == -signal.SIGKILL
    return run


def test_what_a_killed_job_left_goes_and_what_it_took_is_told(killed: Path, run: Path, call: Call) -> None:
    # The room of its archive is reserved, under a temporary name.
    (left,) = killed.glob("step-00000040/data-*/.tmp-*")
    assert left.stat().st_size > 8 << 20
    result = call("gc", killed)
    assert result.exit_code == 0, result.stderr
    assert f"deleted {left.parent}: data of an attempt that was given up, 8" in result.stdout
    assert "MiB freed" in result.stdout
    assert not (run / "step-00000040").exists()
    assert {entry.name for entry in run.glob("step-*")} == {"step-00000010", "step-00000020", "step-00000030"}
    assert "nothing to delete" in call("gc", killed).stdout
    assert call("verify", run).exit_code == 0


def test_a_dry_run_tells_the_same_and_deletes_nothing(killed: Path, call: Call) -> None:
    before = names(killed)
    dry = json.loads(call("gc", killed, "--keep-last", 1, "--dry-run", "--json").stdout)
    assert names(killed) == before
    assert "would delete" in call("gc", killed, "--dry-run").stdout
    wet = json.loads(call("gc", killed, "--keep-last", 1, "--json").stdout)
    assert [one["kind"] for one in wet["removed"]] == ["attempt", "directory", "checkpoint", "checkpoint"]
    assert [one for one in wet["removed"] if one["kind"] != "directory"] == dry["removed"]
    assert (dry["dry_run"], wet["dry_run"]) == (True, False)


def test_only_the_newest_checkpoints_and_multiples_are_kept(run: Path, call: Call) -> None:
    sizes = {step: sum(path.stat().st_size for path in run.glob(f"step-{step:08d}/**/*.*")) for step in (10, 20, 30)}
    removed = json.loads(call("gc", run, "--keep-last", 1, "--keep-every", 20, "--json").stdout)["removed"]
    assert [(one["kind"], one["nbytes"]) for one in removed] == [("checkpoint", sizes[10])]
    assert [one["step"] for one in json.loads(call("ls", run, "--json").stdout)] == [20, 30]
    assert call("gc", run, "--keep-last", 1).exit_code == 0
    assert [one["step"] for one in json.loads(call("ls", run, "--json").stdout)] == [30]
    assert call("verify", run).exit_code == 0


def test_without_being_told_no_checkpoint_goes(run: Path, call: Call) -> None:
    before = names(run)
    assert "nothing to delete" in call("gc", run).stdout
    assert names(run) == before


def test_what_living_jobs_write_and_what_others_keep_beside_it_stays(run: Path, call: Call) -> None:
    storage = LocalStorage(run)
    for name in (
        f"{DEAD}/rank-00000.zarr.zip",
        "data-train-2024/images.tar",
        "data-train/rank-00000.zarr.zip",
        "notes",
    ):
        storage.write_bytes(name, b"precious")
    make_old(run)
    with Lease(storage, DEAD):
        before = names(run)
        assert call("gc", run, "--keep-last", 3).exit_code == 0
        assert names(run) == before
    make_old(run)
    assert call("gc", run).exit_code == 0
    assert before - names(run) == {"step-00000040", DEAD, f"{DEAD}/rank-00000.zarr.zip", f"{DEAD}/lease.json"}


def test_what_a_life_was_restored_from_stays_until_it_has_saved(run: Path, call: Call) -> None:
    LocalStorage(run).write_bytes(
        "generation-0002.json", json.dumps({"format_version": 1, "generation": 2, "parent": [1, 10]}).encode()
    )
    assert call("gc", run, "--keep-last", 1).exit_code == 0
    assert [one["step"] for one in json.loads(call("ls", run, "--json").stdout)] == [10, 30]


def test_a_manifest_that_can_not_be_read_is_told_and_nothing_beside_it_goes(run: Path, call: Call) -> None:
    (run / "step-00000010/manifest-0001.json").write_bytes(b"spoilt")
    (run / "step-00000010/data-deaddeaddead-1").mkdir()
    make_old(run)
    before = names(run / "step-00000010")
    result = call("gc", run, "--keep-last", 1)
    assert result.exit_code == 2
    assert "step-00000010 was not swept" in result.stderr
    assert names(run / "step-00000010") == before
    assert not (run / "step-00000020").exists()


def test_uploads_of_dead_jobs_go(bucket: Bucket, in_environment: Bucket, call: Call, monkeypatch) -> None:
    storage, data = bucket.storage(), np.zeros(11 << 20, np.uint8)
    archive = storage.create_archive(f"{DEAD}/rank-00000.zarr.zip", data.nbytes)
    archive.write(data.ctypes.data, data.nbytes, 0)
    with Lease(storage, DEAD):
        assert "nothing to delete" in call("gc", storage.location()).stdout
    monkeypatch.setattr("ckptengine.catalog.retention.LEASE_SECONDS", -60.0)
    monkeypatch.setattr("ckptengine.catalog.lease.LEASE_SECONDS", -60.0)
    dry = call("gc", storage.location(), "--dry-run")
    assert "would delete" in dry.stdout
    assert len(bucket.uploads()) == 1
    result = call("gc", storage.location())
    assert result.exit_code == 0, result.stderr
    assert f"{DEAD}/rank-00000.zarr.zip: upload that was given up" in result.stdout
    assert "and what 1 upload took freed" in result.stdout
    assert bucket.uploads() == []


def test_a_checkpoint_by_itself_can_be_swept_too(tmp_path: Path, call: Call) -> None:
    ce.save(tmp_path / "point", {"w": np.arange(10.0)})
    (tmp_path / "point/data-deaddeaddead-1").mkdir()
    make_old(tmp_path)
    assert "data-deaddeaddead-1" in call("gc", tmp_path / "point", "--keep-last", 1).stdout
    assert ce.load(tmp_path / "point")["w"][3] == 3


def test_wrong_usage_and_nothing_there_are_errors_that_leave_nothing(tmp_path: Path, call: Call) -> None:
    result = call("gc", tmp_path / "nothing")
    assert (result.exit_code, (tmp_path / "nothing").exists()) == (2, False)
    assert "nothing is there" in result.stderr
    assert call("gc", tmp_path, "--keep-every", 2).exit_code == 2
    assert call("gc", tmp_path, "--keep-last", 0).exit_code == 2
