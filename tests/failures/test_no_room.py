"""A full disk, a place that can't be written to, no memory: real ones wherever the machine allows."""

import errno
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from trained import committed_steps, files_of, same, state_at

import ckptengine as ce
from ckptengine.errors import CheckpointError, SaveFailedError, StorageError
from ckptengine.snapshot import arena

MIB = 1 << 20
NEEDED = r"[\d,]+ bytes are needed and [\d,]+ are available \(No space left on device\)"


def mounted(folder: Path, *arguments: str) -> Path:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this needs the right to mount: {done.stderr.strip()}")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB: two checkpoints of 7 MiB fit, three don't."""
    folder = mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=20m", "ckptengine-test")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_a_full_disk_says_what_is_needed_and_training_goes_on(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    with ce.Checkpointer(run, every=1, keep_last=1, on_error="warn", max_failures=3) as checkpointer:
        assert checkpointer.step(1, state_at(1)) is not None
        checkpointer.wait()
        checkpointer._saver.settle(60)
        filler.write_bytes(bytes(free(small_disk) - 2 * MIB))
        left = free(small_disk)
        for step in (2, 3):
            caplog.clear()
            handle = checkpointer.step(step, state_at(step))
            assert handle is not None
            with pytest.raises(CheckpointError, match=NEEDED):
                handle.durable.result()
            checkpointer.wait()
            assert re.search(rf"step-{step:08d} was NOT saved; training continues .*{NEEDED}", caplog.text)
            assert committed_steps(run) == [1]
        checkpointer._saver.settle(60)
        assert abs(free(small_disk) - left) < 64 << 10, "failed saves must not keep what they have written"
        filler.unlink()
        assert checkpointer.step(4, state_at(4)) is not None
    assert committed_steps(run) == [4]


def test_failures_in_a_row_raise_in_the_end(small_disk: Path) -> None:
    checkpointer = ce.Checkpointer(small_disk / "run", every=1, max_failures=3)
    checkpointer.step(1, state_at(1))
    checkpointer.wait()
    (small_disk / "filler").write_bytes(bytes(free(small_disk) - 2 * MIB))
    checkpointer.step(2, state_at(2))
    checkpointer.step(3, state_at(3))
    checkpointer.step(4, state_at(4))
    with pytest.raises(SaveFailedError, match=rf"step-00000004 was not saved \(3 failure.*{NEEDED}.*not affected"):
        checkpointer.step(5, state_at(5))
    with pytest.raises(SaveFailedError, match=r"step-00000005 was not saved \(4 failure"):
        checkpointer.wait()
    assert checkpointer.restore(state_at(0)) == 1
    with pytest.raises(SaveFailedError, match="the last save of this job failed: .*step 1 is the last one committed"):
        checkpointer.close()


def test_a_disk_that_fills_up_at_the_very_end_of_a_save_gives_the_room_back(small_disk: Path) -> None:
    ce.save(small_disk / "first", state_at(1))
    nbytes = (next((small_disk / "first").glob("data-*")) / "rank-00000.zarr.zip").stat().st_size
    filler, errors, room = small_disk / "filler", [], nbytes - 4096
    while not (small_disk / "second" / "manifest-0001.json").exists():
        filler.write_bytes(bytes(free(small_disk) - room))
        try:
            ce.save(small_disk / "second", state_at(2))
        except CheckpointError as error:
            errors.append(str(error))
            assert files_of(small_disk / "second") == []
        filler.unlink()
        room += 4096
    assert len(errors) >= 3, "the archive, then the layout, then the manifest found no room"
    assert all("No space left on device" in error for error in errors)
    assert same(ce.load(small_disk / "first"), state_at(1))
    assert same(ce.load(small_disk / "second"), state_at(2))


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while filler.write(bytes(4096)):
            pass
    assert free(disk) == 0


def test_a_run_on_a_disk_that_is_full_to_the_last_byte_is_opened_restored_from_and_cleaned_up(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = small_disk / "run"
    with ce.Checkpointer(run, every=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_at(step)).durable.result()
    dead = run / "step-00000003" / "data-0123456789ab-0003"
    dead.mkdir(parents=True)
    (dead / "rank-00000.zarr.zip").write_bytes(b"what a job that was killed has left")
    os.utime(dead, (1, 1))
    fill(small_disk)
    state = state_at(0)
    with ce.Checkpointer(run) as checkpointer:
        assert f"{run} has no space left: it can be read, but saves will fail" in caplog.text
        assert checkpointer.restore(state) == 2
    assert same(state, state_at(2))
    assert not dead.exists(), "opening a run cleans up after dead jobs, which needs the time of the file system"
    fill(small_disk)
    command = [sys.executable, "-m", "ckptengine", "gc", str(run), "--keep-last", "1"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.count("deleted") == 1
    assert free(small_disk) > 6 * MIB
    assert committed_steps(run) == [2]


def test_a_full_disk_can_still_be_read(small_disk: Path) -> None:
    ce.save(small_disk / "point", state_at(1))
    fill(small_disk)
    with pytest.raises(CheckpointError, match=f"{small_disk}.*No space left on device.*make room"):
        ce.save(small_disk / "other", state_at(2))
    with pytest.raises(StorageError, match=f"{small_disk}.*No space left on device.*make room"):
        ce.Checkpointer(small_disk / "run")
    assert same(ce.load(small_disk / "point"), state_at(1))


def test_a_read_only_place_is_named_and_can_be_read(tmp_path: Path) -> None:
    ce.save(tmp_path / "real" / "point", state_at(1))
    folder = mounted(tmp_path / "readonly", "--bind", str(tmp_path / "real"))
    try:
        mounted(folder, "-o", "remount,ro,bind")
        for call in (ce.Checkpointer, lambda path: ce.save(path, state_at(2))):
            with pytest.raises(StorageError, match=rf"cannot .*{folder}/run.*mounted read-only") as caught:
                call(folder / "run")
            assert caught.value.errno == errno.EROFS
        assert same(ce.load(folder / "point"), state_at(1))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("below", ["", "/run", "/a/b"])
def test_a_file_where_a_directory_should_be_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    place = f"{tmp_path}/file{below}"
    with pytest.raises(StorageError, match=rf"{tmp_path}/file.*: Not a directory"):
        ce.save(place, state_at(1, 10))
    with pytest.raises(StorageError, match=rf"{tmp_path}/file.*: Not a directory"):
        ce.Checkpointer(place)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file"):
        ce.load(place)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file"):
        ce.load(place, into=state_at(0, 10))
    assert (tmp_path / "file").read_text() == "not a directory"


def test_a_directory_that_disappears_between_saves_is_made_again(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, state_at(1, 10)).durable.result()
        checkpointer._saver.settle(60)
        (tmp_path / "run").rename(tmp_path / "gone")
        checkpointer.save(2, state_at(2, 10)).durable.result()
    assert committed_steps(tmp_path / "run") == [2]


def test_no_memory_for_the_snapshot_says_how_much_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ce.Checkpointer(tmp_path / "run", every=1) as checkpointer:
        checkpointer.step(1, state_at(1, 1000))
        monkeypatch.setattr(arena, "available_nbytes", lambda: 4 * MIB)
        with caplog.at_level(logging.ERROR):
            assert checkpointer.step(2, state_at(2)) is None
        assert re.search(
            r"no memory for the snapshot: [\d,]{9,} bytes are needed, 4,194,304 are available", caplog.text
        )
        checkpointer.step(3, state_at(3, 1000))
        checkpointer.wait()
        assert committed_steps(tmp_path / "run") == [1, 3]
        monkeypatch.undo()
        checkpointer.step(4, state_at(4))
    assert committed_steps(tmp_path / "run") == [1, 3, 4]


SHORT = """
import logging, resource, sys
from pathlib import Path
import numpy as np
import ckptengine as ce
from trained import same

MIB = 1 << 20
logging.basicConfig()
state = {"large": np.arange(12 * MIB)}
kept = resource.getrlimit(resource.RLIMIT_AS)
with ce.Checkpointer(sys.argv[1], preemption=None) as run:
    run.save(1, {"small": np.arange(10)}).durable.result()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 88 * MIB, kept[1]))
    run.save(2, state).durable.result()
    resource.setrlimit(resource.RLIMIT_AS, kept)
assert same(ce.load(sys.argv[1]), state)
"""


def test_a_snapshot_that_memory_is_too_short_for_goes_through_what_there_is_and_says_how_much_is_missing(
    tmp_path: Path,
) -> None:
    # The limit counts addresses: without this each thread's first allocation would reserve 64 MiB of them.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SHORT, str(tmp_path / "run")]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert job.returncode == 0, job.stderr
    told = r"no memory for the snapshot: 10[\d,]{9} bytes are needed.*the snapshot uses [\d,]{10} bytes"
    assert re.search(told, job.stderr)


def test_where_the_system_gives_no_thread_but_the_saves_own_a_job_is_opened_saved_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = threading.Thread.start, set()

    def sparing(self: threading.Thread) -> None:
        if self.name != "ckptengine-save":
            refused.add(self.name)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", sparing)
    with ce.Checkpointer(tmp_path, every=1, keep_last=1, preemption=None) as checkpointer:
        assert checkpointer.restore(state_at(0)) is None
        for step in (1, 2):
            checkpointer.step(step, state_at(step))
    state = state_at(0)
    with ce.Checkpointer(tmp_path, every=1, preemption=None) as checkpointer:
        assert checkpointer.restore(state) == 2
    assert same(state, state_at(2))
    assert {f"ckptengine-{name}" for name in ("within", "life", "lease", "aside", "arena", "clean")} <= refused
    assert "nothing renews this lease" in caplog.text
    assert committed_steps(tmp_path) == [2]
