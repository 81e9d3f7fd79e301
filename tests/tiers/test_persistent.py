"""Saves commit on the local disk and come to the bucket in the background, whatever the bucket does meanwhile."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from buckets import QUICK
from committed_steps import state_of as of_size
from committed_steps import steps_in as steps
from launch import environment
from tiered import Running, finish

import ckptengine as ce
from ckptengine.storage.local import LocalStorage
from ckptengine.tiers import uploader
from ckptengine.tiers.memory import memory_root

SIZE = 150_000
PARTS = 1_500_000
"""So many elements go to the bucket in three parts."""


state_of = functools.partial(of_size, size=SIZE)


def eventually(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_that_ends_has_its_newest_checkpoint_in_the_bucket_and_each_tier_keeps_its_own_number(bucket, tmp_path):
    local, persistent = LocalStorage(tmp_path / "ckpt"), bucket.storage()
    with ce.Checkpointer(
        f"{bucket.url}/run",
        local=tmp_path / "ckpt",
        keep_last={"local": 2, "s3": 3},
        storage_options=bucket.options,
        preemption=None,
    ) as ckpt:
        for step in range(1, 8):
            ckpt.save(step, state_of(step)).durable.result()
            ckpt.flush()
            assert ckpt.uploaded == step
    assert steps(local) == [6, 7]
    assert steps(persistent) == [5, 6, 7]
    assert ce.load(f"{bucket.url}/run", storage_options=bucket.options)["w"][SIZE - 1] == 7
    # An empty machine: what it needs comes from the bucket.
    state = state_of(0)
    with ce.Checkpointer(
        f"{bucket.url}/run", local=tmp_path / "other", storage_options=bucket.options, preemption=None
    ) as again:
        assert again.restore(state) == 7
    assert state["w"].min() == state["w"].max() == 7


def test_a_bucket_that_fails_never_stops_training_and_catches_up_with_the_newest(
    bucket, disturbed, proxy, tmp_path, quick, caplog, monkeypatch
):
    monkeypatch.setattr("ckptengine.tiers.uploader._RETRY_SECONDS", (0.2, 0.5))
    local, persistent = LocalStorage(tmp_path / "ckpt"), bucket.storage()
    with ce.Checkpointer(
        f"{bucket.url}/run",
        local=tmp_path / "ckpt",
        keep_last={"local": 2},
        storage_options=disturbed.options,
        preemption=None,
    ) as ckpt:
        ckpt.save(1, of_size(1, PARTS)).durable.result()
        ckpt.flush()
        down = proxy.fault("503", "(PUT|POST) .*step-", times=10_000)
        for step in range(2, 7):
            stats = ckpt.save(step, of_size(step, PARTS)).durable.result()
            assert stats is not None
            assert stats.path == str(tmp_path / "ckpt" / f"step-{step:08d}")
        eventually(lambda: "training continues, and the upload is tried again" in caplog.text)
        assert steps(persistent) == [1]
        down.times = 0
        eventually(lambda: ckpt.uploaded == 6)
    assert steps(local) == [5, 6]
    assert steps(persistent) == [1, 6]
    assert bucket.uploads() == []
    assert "SECRET" not in caplog.text


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("ckptengine.tiers.uploader._RETRY_SECONDS", (0.2, 0.5))


def saved_while_refused(pattern: str, places: dict, disturbed, proxy) -> ce.Checkpointer:
    """Upload step 1, and save step 2 while the bucket refuses requests of a pattern for good."""
    ckpt = ce.Checkpointer(**places, storage_options=disturbed.options, timeout=12)
    ckpt.save(1, state_of(1)).durable.result()
    ckpt.flush()
    proxy.fault("403", pattern, times=10_000)
    ckpt.save(2, state_of(2)).durable.result()
    return ckpt


def test_where_the_bucket_stays_down_the_end_says_where_the_checkpoint_is_and_the_next_start_brings_it(
    bucket, disturbed, proxy, tmp_path, quick, impatient
):
    places = {"run": f"{bucket.url}/run", "local": tmp_path / "ckpt", "preemption": None}
    ckpt = saved_while_refused("(PUT|POST) .*step-", places, disturbed, proxy)
    with pytest.raises(ce.errors.SaveFailedError, match=r"step 2 is durable in .*ckpt, but is not in s3://.*permit"):
        ckpt.close()
    with ce.Checkpointer(**places, storage_options=bucket.options) as again:
        assert again.restore(state_of(0)) == 2
    assert steps(bucket.storage()) == [1, 2]


def test_a_bucket_that_takes_the_data_and_never_the_manifest_does_not_hold_the_end_for_ever(
    bucket, disturbed, proxy, tmp_path, quick, impatient
):
    places = {"run": f"{bucket.url}/run", "local": tmp_path / "ckpt", "preemption": None}
    ckpt = saved_while_refused("PUT .*manifest", places, disturbed, proxy)
    with pytest.raises(ce.errors.SaveFailedError, match=r"step 2 is durable in .*ckpt, but is not in s3://.*manifest"):
        ckpt.close()


def test_a_local_copy_that_is_damaged_is_not_used_nor_spread_and_the_buckets_is_taken(bucket, tmp_path, caplog):
    places = {"run": f"{bucket.url}/run", "local": tmp_path / "ckpt", "storage_options": bucket.options}
    with ce.Checkpointer(**places, preemption=None) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).durable.result()
        ckpt.flush()
    (archive,) = (tmp_path / "ckpt").glob("step-00000002/data-*/rank-*")
    with archive.open("r+b") as file:
        file.seek(500_000)
        file.write(b"\1" * 8)
    state = state_of(0)
    with ce.Checkpointer(**places, preemption=None) as again:
        assert again.restore(state) == 2
    assert state["w"].min() == state["w"].max() == 2
    assert str(archive) in caplog.text


def test_a_local_disk_that_can_not_be_read_costs_no_step_that_the_bucket_has(bucket, tmp_path, monkeypatch):
    places = {"run": f"{bucket.url}/run", "local": tmp_path / "ckpt", "storage_options": bucket.options}
    with ce.Checkpointer(**places, preemption=None) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).durable.result()
        ckpt.flush()
    load = LocalStorage.load_archive

    def failing(self, name, *arguments):
        if name.rpartition("/")[2].startswith("rank-"):
            raise ce.errors.StorageError(5, f"cannot read {self.location(name)}: Input/output error")
        return load(self, name, *arguments)

    monkeypatch.setattr(LocalStorage, "load_archive", failing)
    state = state_of(0)
    with ce.Checkpointer(**places, preemption=None) as again:
        assert again.restore(state) == 2
    assert state["w"].min() == state["w"].max() == 2
    # The bucket has lost it: an older one is not taken in its place, for the disk may be repaired.
    bucket.fs.rm(f"{bucket.url}/run/step-00000002", recursive=True)
    with ce.Checkpointer(**places, preemption=None) as again, pytest.raises(ce.errors.StorageError, match="Input/out"):
        again.restore(state)


@pytest.mark.parametrize("lost", ["bucket", "local", "memory"])
def test_with_each_tier_lost_in_turn_two_ranks_go_on_from_what_four_have_saved(in_environment, tmp_path, lost):
    memory = f"/dev/shm/ckptengine-test-{in_environment.url[-12:]}"
    places = {"run": f"{in_environment.url}/run", "local": str(tmp_path / "ckpt"), "memory": memory}
    Path(memory).mkdir()
    try:
        with Running(4, tmp_path, **places, until=3, wait_for=str(tmp_path / "never")) as job:
            job.wait_for(3)
            eventually(lambda: steps(in_environment.storage())[-1:] == [3])
            eventually(lambda: steps(memory_root(places["run"], memory))[-1:] == [3])
            job.kill()
        # All but one are lost for each of them to be the only one once.
        if lost != "bucket":
            in_environment.fs.rm(f"{in_environment.url}/run", recursive=True)
        if lost != "local":
            shutil.rmtree(tmp_path / "ckpt")
        if lost != "memory":
            shutil.rmtree(memory)
            Path(memory).mkdir()
        reports = finish(2, tmp_path, **places, until=4)
        assert [report["restored"] for report in reports] == [3, 3]
        assert steps(in_environment.storage())[-1] == 4
    finally:
        shutil.rmtree(memory)


def test_another_job_that_took_the_run_over_is_not_written_over(bucket, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("ckptengine.tiers.uploader._RETRY_SECONDS", (0.2, 0.5))
    common = {"storage_options": bucket.options, "preemption": None, "timeout": 20}
    first = ce.Checkpointer(f"{bucket.url}/run", local=tmp_path / "one", **common)
    first.save(1, state_of(1)).durable.result()
    first.flush()
    with ce.Checkpointer(f"{bucket.url}/run", local=tmp_path / "two", **common) as second:
        second.restore(state_of(0))
        second.save(2, state_of(22)).durable.result()
    first.save(2, state_of(2)).durable.result()
    with pytest.raises(ce.errors.SaveFailedError, match="taken over by generation 2"):
        first.close()
    assert ce.load(f"{bucket.url}/run", storage_options=bucket.options)["w"][0] == 22


def test_uploads_keep_to_the_bytes_per_second_that_they_are_given(bucket, tmp_path):
    moved: list[int] = []
    began = time.monotonic()
    with ce.Checkpointer(
        f"{bucket.url}/run",
        local=tmp_path / "ckpt",
        storage_options=bucket.options,
        upload_bytes_per_second=8e5,
        preemption=None,
    ) as ckpt:
        ckpt.save(1, state_of(1)).durable.result()
        ckpt.flush()
        moved.append(SIZE * 8)
    # A second's worth may go at once.
    assert sum(moved) <= 8e5 * (time.monotonic() - began + 1)


def test_checkpoints_come_home_while_those_in_memory_are_replaced_faster_than_they_could_be_moved(
    tmp_path, memory, caplog, monkeypatch
):
    places = {"run": tmp_path / "run", "local": tmp_path / "ckpt", "memory": memory}
    step, copy, replaced = 0, uploader.copy_archive, threading.Event()

    def copied(*arguments, **more):
        nbytes = copy(*arguments, **more)
        assert replaced.wait(60)  # however long the saves take
        return nbytes

    monkeypatch.setattr(uploader, "copy_archive", copied)
    with ce.Checkpointer(**places, upload_bytes_per_second=6e5, preemption=None) as ckpt:
        while ckpt.uploaded is None:
            step += 1
            ckpt.save(step, state_of(step)).durable.result()
            if step == 3:
                replaced.set()  # both images in memory are others now
            time.sleep(0.4)
            assert step < 150
    assert step > 2
    assert ckpt.uploaded == step
    assert "tried again" not in caplog.text


def test_a_local_directory_of_another_run_is_refused(bucket, tmp_path):
    common = {"storage_options": bucket.options, "preemption": None}
    for run in ("one", "two"):
        with ce.Checkpointer(f"{bucket.url}/{run}", **common) as ckpt:
            ckpt.save(1, state_of(1))
    with ce.Checkpointer(f"{bucket.url}/one", local=tmp_path / "ckpt", **common) as ckpt:
        ckpt.restore(state_of(0))
        ckpt.save(2, state_of(2))
    with pytest.raises(ce.errors.StorageError, match="another"):
        ce.Checkpointer(f"{bucket.url}/two", local=tmp_path / "ckpt", **common)


def test_threads_of_the_uploader_end_with_the_checkpointer(bucket, tmp_path):
    before = set(threading.enumerate())
    with ce.Checkpointer(
        f"{bucket.url}/run", local=tmp_path / "ckpt", storage_options=bucket.options, preemption=None
    ) as ckpt:
        ckpt.save(1, state_of(1))
    assert not [one for one in threading.enumerate() if one.name == "ckptengine-uploader" and one not in before]


PREEMPTED = """
import os, signal, sys, time
import numpy as np
import ckptengine as ce

run, local, memory = sys.argv[1:]
with ce.Checkpointer(run, local=local, memory=memory, every=100) as ckpt:
    for step in range(1, 1000):
        ckpt.step(step, {"w": np.full(150_000, float(step)), "step": step})
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
"""


def test_a_job_that_is_told_to_end_has_its_last_step_in_the_bucket_and_leaves_its_memory(
    in_environment, tmp_path, memory
):
    run, local = f"{in_environment.url}/run", tmp_path / "ckpt"
    command = [sys.executable, "-c", PREEMPTED, run, str(local), str(memory)]
    job = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert job.returncode == 75, job.stderr
    (step,) = steps(in_environment.storage())
    assert f"step {step} is saved; exiting with code 75" in job.stderr
    assert [steps(LocalStorage(place)) for place in (local, memory_root(run, memory))] == [[step]] * 2
    state = state_of(0)
    with ce.Checkpointer(run, local=local, memory=memory, preemption=None) as again:
        assert again.restore(state) == step
    assert state["w"][0] == step


def test_a_job_cannot_begin_while_the_bucket_is_down_for_its_disk_may_be_behind(
    bucket, disturbed, proxy, tmp_path, quick, monkeypatch
):
    places = {"run": f"{bucket.url}/run", "local": tmp_path / "ckpt", "preemption": None}
    with ce.Checkpointer(**places, storage_options=bucket.options) as ckpt:
        ckpt.save(1, state_of(1))
    monkeypatch.setattr("ckptengine.storage.remote.Patience", lambda: replace(QUICK, seconds=1))
    proxy.fault("503 SlowDown", ".*", times=10_000)
    with pytest.raises(ce.errors.StorageError, match=r"s3://.*(503 SlowDown|TimeoutError).* \(\d+ tries in \d"):
        ce.Checkpointer(**places, storage_options=disturbed.options)


def test_a_disk_that_was_left_behind_does_not_win_over_what_the_job_has_done_since(bucket, tmp_path):
    common = {"run": f"{bucket.url}/run", "storage_options": bucket.options, "preemption": None}
    with ce.Checkpointer(**common, local=tmp_path / "old") as ckpt:
        for step in (1, 9):
            ckpt.save(step, state_of(step)).durable.result()
            ckpt.flush()
    bucket.fs.rm(f"{bucket.url}/run/step-00000009", recursive=True)  # as if it had never come there
    assert steps(LocalStorage(tmp_path / "old")) == [1, 9]
    with ce.Checkpointer(**common, local=tmp_path / "new") as ckpt:
        assert ckpt.restore(state_of(0)) == 1
        ckpt.save(2, state_of(2))
    state = state_of(0)
    with ce.Checkpointer(**common, local=tmp_path / "old") as again:
        assert again.restore(state) == 2
    assert state["w"][0] == 2
