"""The memory of snapshots: prepared before it is needed, and bounded where that is asked for."""

import threading
import zipfile

import numpy as np
import pytest

import ckptengine as ce
from ckptengine.errors import CheckpointError
from ckptengine.snapshot import arena
from ckptengine.storage.disk import Disk

MIB = 1 << 20


def state_of(seed: int) -> dict[str, np.ndarray]:
    """Return 50 MiB: a large array, some of odd sizes, one with other strides, and thousands of small ones."""
    chance = np.random.default_rng(seed)
    state = {"large": chance.integers(0, 99, 5 * MIB), "odd": chance.integers(0, 99, MIB + 12345, np.uint8)}
    state["columns"] = chance.standard_normal((1200, 700)).T
    state |= {f"small.{number}": chance.standard_normal(number % 400 + 1) for number in range(3000)}
    return state


def archive(path) -> bytes:
    (file,) = path.rglob("rank-00000.zarr.zip")
    return file.read_bytes()


def test_a_file_that_went_through_little_memory_is_the_same_to_the_byte(tmp_path):
    state = state_of(1)
    with (
        ce.Checkpointer(tmp_path / "whole") as whole,
        ce.Checkpointer(tmp_path / "less", arena_nbytes=16 * MIB) as less,
    ):
        whole.save(1, state)
        handle = less.save(1, state)
        changed = {name: array.copy() for name, array in state.items()}
        for array in state.values():
            array[...] = 0  # the call has returned: the snapshot is complete
        handle.durable.result()
        assert archive(tmp_path / "less") == archive(tmp_path / "whole")
        less.save(2, changed)
    stored = ce.load(tmp_path / "less")
    assert all(np.array_equal(stored[name], array) for name, array in changed.items())
    with zipfile.ZipFile(next((tmp_path / "less" / "step-00000002").rglob("rank-*.zip"))) as file:
        assert file.testzip() is None


def test_a_disk_that_fails_under_a_bounded_snapshot_ends_the_call(tmp_path, monkeypatch):
    write, count = Disk.write_memory, 0

    def fail(disk, fd, address, nbytes, position):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(5, "Input/output error")
        write(disk, fd, address, nbytes, position)

    monkeypatch.setattr(Disk, "write_memory", fail)
    with ce.Checkpointer(tmp_path / "run", arena_nbytes=16 * MIB) as run:
        with pytest.raises(CheckpointError, match="storage failed before the snapshot was complete"):
            run.save(1, state_of(2))
        monkeypatch.setattr(Disk, "write_memory", write)
        run.save(2, state_of(3)).durable.result()
    assert [path.parent.name for path in (tmp_path / "run").glob("step-*/manifest-*")] == ["step-00000002"]


def test_the_first_save_finds_its_memory_prepared_by_a_step_that_was_not_due(tmp_path, monkeypatch):
    threads, ask = [], arena.available_nbytes

    def record():
        threads.append(threading.current_thread().name)
        return ask()

    monkeypatch.setattr(arena, "available_nbytes", record)
    state = state_of(4)
    with ce.Checkpointer(tmp_path / "run", every=2) as run:
        assert run.step(1, state) is None
        handle = run.step(2, state)
        handle.durable.result()
    assert threads == ["ckptengine-arena", "ckptengine-save"], "the image's, and the small one of the tail"


def test_too_little_memory_to_bound_a_snapshot_by_is_refused(tmp_path):
    with pytest.raises(ValueError, match="arena_nbytes=4096: give bytes .*from 16777216 on"):
        ce.Checkpointer(tmp_path / "run", arena_nbytes=4096)
