"""Snapshots in shared memory outlive the trainer: the restarted job goes on from the last one, not from the disk's."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from committed_steps import steps_in as steps
from tiered import Running, finish
from waiting import until

import ckptengine as ce
from ckptengine.errors import DeadlineError, SaveFailedError, StorageError
from ckptengine.storage.local import LocalArchiveWriter, LocalStorage
from ckptengine.tiers.memory import memory_root
from ckptengine.tiers.uploader import Uploader


def state_of(step: int) -> dict:
    return {"w": np.full(300_000, float(step)), "step": step}


@pytest.mark.parametrize("local", [False, True])
def test_ranks_killed_after_the_snapshot_and_before_the_write_resume_from_that_very_step(tmp_path, memory, local):
    run = tmp_path / "run"
    places = {"run": str(run), "memory": str(memory), "local": str(tmp_path / "local") if local else None}
    with Running(4, tmp_path, **places, until=3, stuck=3) as job:
        job.wait_for(3)
        job.kill()
    assert steps(places["local"] or run) == [1, 2]
    root = memory_root(str(run), memory)
    assert steps(root)[-1] == 3
    reports = finish(4, tmp_path, **places, until=3)
    assert [report["restored"] for report in reports] == [3] * 4
    # And it was completed: brought to the run's own place, and taken out of memory by the job that ended well.
    assert steps(run)[-1] == 3
    assert ce.load(run)["step"] == 3
    assert os.listdir(memory) == []


def test_two_ranks_restore_another_sharding_from_the_memory_of_four(tmp_path, memory):
    places = {"run": str(tmp_path / "run"), "memory": str(memory)}
    with Running(4, tmp_path, **places, until=2, stuck=2) as job:
        job.wait_for(2)
        job.kill()
    assert [report["restored"] for report in finish(2, tmp_path, **places, until=4)] == [2, 2]
    assert steps(tmp_path / "run")[-1] == 4


def test_a_checkpoint_is_the_same_to_the_byte_in_memory_and_on_the_disk(tmp_path, memory, monkeypatch):
    run, made = tmp_path / "run", iter(range(1000))
    monkeypatch.setattr("ckptengine.catalog.manifest.utc_now", lambda: f"2026-01-01T00:00:00.{next(made):03d}Z")
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None)
    ckpt.save(1, state_of(1)).durable.result()
    leave(ckpt)
    root = Path(memory_root(str(run), memory))
    names = {str(path.relative_to(run)) for path in run.glob("step-*/**/*") if path.is_file()}
    assert len(names) == 3
    assert {name: (run / name).read_bytes() for name in names} == {name: (root / name).read_bytes() for name in names}


def test_memory_of_a_run_that_was_deleted_and_begun_anew_is_recognized_and_removed(tmp_path, memory, caplog):
    run = tmp_path / "run"
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None)
    for step in (1, 2):
        ckpt.save(step, state_of(step)).durable.result()
    leave(ckpt)
    shutil.rmtree(run)
    with ce.Checkpointer(run, preemption=None) as other:  # begun anew, without tiers
        other.save(1, state_of(11))
    state = state_of(0)
    with ce.Checkpointer(run, memory=memory, preemption=None) as again:
        assert again.restore(state) == 1
    assert state["w"][0] == 11
    assert "of an earlier run" in caplog.text


def leave(ckpt: ce.Checkpointer) -> None:
    """End a Checkpointer as a killed process does, as far as its memory goes: the locks go, the files stay."""
    ckpt.wait()
    ckpt._saver.settle(60)
    ckpt._tiers.close(done=False)


def test_memory_alone_brings_a_run_back_whose_directory_is_lost_and_says_so(tmp_path, memory, caplog):
    run = tmp_path / "run"
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None)
    for step in (1, 2, 3):
        ckpt.save(step, state_of(step)).durable.result()
    leave(ckpt)
    shutil.rmtree(run)
    state = state_of(0)
    with ce.Checkpointer(run, memory=memory, preemption=None) as again:
        assert again.restore(state) == 3
    assert state["w"][0] == 3
    assert "is empty" in caplog.text
    assert steps(run) == [3]


def test_an_image_that_was_damaged_in_memory_is_not_used_and_the_disks_copy_is(tmp_path, memory, caplog):
    run = tmp_path / "run"
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None)
    for step in (1, 2):
        ckpt.save(step, state_of(step)).durable.result()
    leave(ckpt)
    (image,) = Path(memory_root(str(run), memory)).glob("step-00000002/data-*/rank-*")
    with image.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\1" * 8)
    state = state_of(0)
    with ce.Checkpointer(run, memory=memory, preemption=None) as again:
        assert again.restore(state) == 2
    assert state["w"].min() == state["w"].max() == 2
    assert str(image) in caplog.text


def test_what_lies_in_memory_is_this_users_alone(tmp_path, memory):
    with ce.Checkpointer(tmp_path / "run", memory=memory, preemption=None) as ckpt:
        ckpt.save(1, state_of(1)).durable.result()
        root = Path(memory_root(str(tmp_path / "run"), memory))
        assert root.stat().st_mode & 0o777 == root.parent.stat().st_mode & 0o777 == 0o700
        arenas = list((root / "arenas").iterdir())
        assert len(arenas) == 2
        assert {path.stat().st_mode & 0o777 for path in arenas} == {0o600}


def test_a_directory_in_memory_that_others_may_enter_is_refused(tmp_path, memory):
    root = Path(memory_root(str(tmp_path / "run"), memory))
    root.mkdir(parents=True, mode=0o777)
    root.parent.chmod(0o777)
    with pytest.raises(ce.errors.StorageError, match="does not belong to this user alone"):
        ce.Checkpointer(tmp_path / "run", memory=memory, preemption=None)


def test_memory_on_a_disk_is_refused(tmp_path):
    with pytest.raises(ce.errors.StorageError, match="not on a tmpfs"):
        ce.Checkpointer(tmp_path / "run", memory=tmp_path, preemption=None)


def test_where_shared_memory_is_too_small_that_is_said_once_and_the_disk_takes_the_saves(tmp_path, caplog):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(small)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with ce.Checkpointer(tmp_path / "run", memory=small, preemption=None) as ckpt:
            for step in (1, 2):
                ckpt.save(step, state_of(step)).durable.result()
        assert steps(tmp_path / "run") == [1, 2]
        assert caplog.text.count("no room for an image of") == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_where_shared_memory_has_become_too_small_it_keeps_what_it_has_and_gives_the_rest_back(tmp_path, caplog):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(small)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        root = memory_root(str(tmp_path / "run"), small)
        with ce.Checkpointer(tmp_path / "run", memory=small, preemption=None) as ckpt:
            for step in (1, 2):
                ckpt.save(step, state_of(step)).durable.result()
            larger = {"w": np.zeros(900_000), "step": 3}
            ckpt.save(3, larger).durable.result()
            ckpt._saver.settle(60)
            assert steps(root) == [2]
            arenas = [path.stat().st_blocks for path in sorted((Path(root) / "arenas").iterdir())]
            assert sorted(blocks > 0 for blocks in arenas) == [False, True]
            ckpt.save(4, state_of(4)).durable.result()
            ckpt._saver.settle(60)
            assert steps(root) == [4]
        assert steps(tmp_path / "run") == [1, 2, 3, 4]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_job_that_failed_leaves_its_memory_for_the_next_start_and_arenas_of_ended_ranks_go(tmp_path, memory):
    run = tmp_path / "run"
    root = Path(memory_root(str(run), memory))
    with pytest.raises(RuntimeError, match="training"), ce.Checkpointer(run, memory=memory, preemption=None) as ckpt:
        ckpt.save(1, state_of(1)).durable.result()
        raise RuntimeError("training")
    assert steps(root) == [1]
    left = root / "arenas" / "rank-00007-a"
    left.write_bytes(b"of a rank that this job does not have any more")
    with ce.Checkpointer(run, memory=memory, preemption=None) as again:
        assert again.restore(state_of(0)) == 1
        again.save(2, state_of(2)).durable.result()
        again._saver.settle(60)
        assert steps(root) == [2]
        assert not left.exists()


def test_gc_frees_the_memory_of_a_job_that_ended_and_leaves_that_of_a_living_one(tmp_path, call):
    run = tmp_path / "run"
    root = Path(memory_root(str(run), True))
    ckpt = ce.Checkpointer(run, memory=True, preemption=None)
    ckpt.save(1, state_of(1)).durable.result()
    assert "nothing to delete" in call("gc", str(run), "--memory").output
    leave(ckpt)
    assert "would delete" in call("gc", str(run), "--memory", "--dry-run").output
    assert steps(root) == [1]
    assert "images in shared memory" in call("gc", str(run), "--memory").output
    assert [name for _, _, names in os.walk(root) for name in names] == []
    assert steps(run) == [1]


def test_gc_leaves_images_of_which_it_can_not_be_told_whether_a_living_job_has_them(tmp_path, call, monkeypatch):
    run = tmp_path / "run"
    root = Path(memory_root(str(run), True))
    ckpt = ce.Checkpointer(run, memory=True, preemption=None)
    ckpt.save(1, state_of(1)).durable.result()
    ckpt._saver.settle(60)
    before = sorted(map(str, root.rglob("*")))
    real = os.open

    def failing(path: Any, *arguments: Any, **options: Any) -> int:
        if "/arenas/" in str(path) or (str(path).startswith(str(root)) and str(path).endswith(".zip")):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    result = call("gc", str(run), "--memory")
    monkeypatch.undo()
    assert sorted(map(str, root.rglob("*"))) == before
    assert result.exit_code == 2
    assert f"cannot look whether a process has {root}/arenas/rank-00000-a: Too many open files" in result.output
    ckpt.close()


def test_the_manifest_is_the_same_in_all_places_however_long_the_disk_takes(tmp_path, memory, monkeypatch):
    disk, create = str(tmp_path / "local"), LocalStorage.create_archive

    def slow(self: LocalStorage, *arguments: Any, **options: Any) -> LocalArchiveWriter:
        if str(self.root) == disk:
            time.sleep(1.1)  # manifests tell the second in which they were made
        return create(self, *arguments, **options)

    monkeypatch.setattr(LocalStorage, "create_archive", slow)
    run = tmp_path / "run"
    with ce.Checkpointer(run, local=disk, memory=memory, preemption=None, timeout=20) as ckpt:
        ckpt.save(1, state_of(1)).durable.result()
        ckpt.flush()
        places = run, Path(disk), Path(memory_root(str(run), memory))
        manifests = [(place / "step-00000001" / "manifest-0001.json").read_bytes() for place in places]
    assert manifests[0] == manifests[1] == manifests[2]


def refuse(monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    """Have a disk take no archive from now on."""
    create = LocalStorage.create_archive

    def refused(self, name, nbytes, **more):
        if self.root == disk:
            raise StorageError(28, f"{disk}: no room")
        return create(self, name, nbytes, **more)

    monkeypatch.setattr(LocalStorage, "create_archive", refused)


def test_what_could_not_be_made_durable_stays_in_memory_at_the_end_of_the_job_and_the_next_start_brings_it(
    tmp_path, memory, monkeypatch, caplog
):
    run = tmp_path / "run"
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None)
    ckpt.save(1, state_of(1)).durable.result()
    with monkeypatch.context() as patch:
        refuse(patch, run)
        ckpt.save(2, state_of(2)).durable.wait()
        ckpt._saver.settle(60)
    with pytest.raises(SaveFailedError, match="the last save of this job failed: .*step 1 is the last one committed"):
        ckpt.close()
    assert "step 2 is in memory only" in caplog.text
    assert steps(run) == [1]
    state = state_of(0)
    with ce.Checkpointer(run, memory=memory, preemption=None) as again:
        assert again.restore(state) == 2
    assert state["w"][0] == 2
    assert steps(run) == [1, 2]


def test_a_step_whose_save_failed_and_is_saved_again_is_in_memory_as_it_was_last(tmp_path, memory, monkeypatch):
    run = tmp_path / "run"
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None)
    ckpt.save(1, state_of(1)).durable.result()
    with monkeypatch.context() as patch:
        refuse(patch, run)
        for value in (21, 22):
            ckpt.save(2, {"w": np.full(300_000, float(value)), "step": 2}).durable.wait()
            ckpt._saver.settle(60)
    ckpt._tiers.close(done=False)
    state = state_of(0)
    with ce.Checkpointer(run, memory=memory, preemption=None) as again:
        assert again.restore(state) == 2
    assert state["w"].min() == state["w"].max() == 22


def test_a_run_that_goes_on_from_memory_before_its_checkpoint_came_home_is_not_taken_for_another_jobs(
    tmp_path, memory, monkeypatch, caplog
):
    run = tmp_path / "run"
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None)
    ckpt.save(1, state_of(1)).durable.result()
    with monkeypatch.context() as patch:
        refuse(patch, run)
        ckpt.save(2, state_of(2)).durable.wait()
        leave_failed(ckpt)
    offered = []
    with monkeypatch.context() as patch:
        patch.setattr(Uploader, "offer", lambda self, load: offered.append(load))
        again = ce.Checkpointer(run, memory=memory, preemption=None)
        assert again.restore(state_of(0)) == 2
        assert again._tiers.claims.claim((1, 2)) == 2
    again._tiers._uploader.offer(*offered)
    again.close()
    assert "taken over" not in caplog.text
    assert steps(run) == [1, 2]


def leave_failed(ckpt: ce.Checkpointer) -> None:
    ckpt._saver.settle(60)
    ckpt._tiers.close(done=False)


def uploaders_since(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return the uploaders' threads that live, but for those of other tests."""
    return {thread for thread in threading.enumerate() if thread.name == "ckptengine-uploader"} - before


def test_a_close_that_fails_ends_the_threads_and_leaves_the_memory_that_a_save_still_reads(memory, monkeypatch):
    run, going = memory / "run", threading.Event()  # no disk whose syncs take a part of the second
    create, before = LocalStorage.create_archive, set(threading.enumerate())

    def stuck(self, name, nbytes, **more):
        if self.root == run:
            going.wait(60)
        return create(self, name, nbytes, **more)

    monkeypatch.setattr(LocalStorage, "create_archive", stuck)
    ckpt = ce.Checkpointer(run, memory=memory, preemption=None, timeout=1)
    handle = ckpt.save(1, state_of(1))
    with pytest.raises(DeadlineError):
        ckpt.close()
    assert not uploaders_since(before)
    going.set()
    handle.durable.wait()
    assert ckpt._saver._flight is not None
    ckpt._saver._flight.thread.join(60)
    if handle.durable.error is None:  # it came in time after all: then it is what was saved
        assert ce.load(run)["w"][-1] == 1
    ckpt.close()


def test_a_checkpointer_that_is_dropped_without_being_closed_gives_its_memory_and_its_thread_back(tmp_path, memory):
    before = set(threading.enumerate())
    for step in range(1, 7):  # more often than there are names
        ckpt = ce.Checkpointer(tmp_path / "run", memory=memory, preemption=None)
        ckpt.restore(state_of(0))
        ckpt.save(step, state_of(step)).durable.result()
        ckpt._saver.settle(60)
        assert steps(memory_root(str(tmp_path / "run"), memory)) == [step]
        del ckpt
        gc.collect()
    until(lambda: not uploaders_since(before), "the threads end")
