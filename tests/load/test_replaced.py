"""Readers beside a writer that replaces or deletes what they read."""

import subprocess
import sys
import time
from itertools import count

import numpy as np
import pytest

import ckptengine as ce
from ckptengine import inspect
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError, StorageError
from ckptengine.load.checkpoint import Checkpoint

SIZE = 1 << 18


def state(number):
    return {"a": np.full(SIZE, number, np.float64), "b": {"c": np.full(SIZE, number, np.int32)}, "number": number}


def check(loaded):
    number = loaded["number"]
    assert (loaded["a"] == number).all()
    assert (loaded["b"]["c"] == number).all()
    return number


def load_arrays(path):
    return check(ce.load(path))


def load_into(path):
    target = state(0)
    ce.load(path, into=target)
    return check(target)


def restore(path):
    target = state(0)
    with ce.Checkpointer(path, preemption=None) as checkpointer:
        checkpointer.restore(target)
    return check(target)


def described(path):
    return inspect.describe(path).values["number"]


@pytest.fixture
def disturbed(monkeypatch):
    """Have something done in the middle of a read: when the first archive is opened."""

    def disturb(call):
        original, pending = Checkpoint.archive, [call]

        def archive(self, rank):
            if pending:
                pending.pop()()
            return original(self, rank)

        monkeypatch.setattr(Checkpoint, "archive", archive)

    return disturb


@pytest.mark.parametrize("read", [load_arrays, load_into, described])
def test_a_checkpoint_that_is_replaced_while_it_is_read_gives_the_new_one(tmp_path, disturbed, read):
    ce.save(tmp_path, state(1))
    disturbed(lambda: ce.save(tmp_path, state(2)))
    assert read(tmp_path) == 2


@pytest.mark.parametrize("read", [load_arrays, load_into, restore, described])
def test_a_step_that_retention_deletes_while_it_is_read_gives_the_newest(tmp_path, disturbed, read):
    writer = ce.Checkpointer(tmp_path, keep_last=1, preemption=None)
    writer.save(1, state(1)).durable.result()

    def go_on():
        writer.save(2, state(2))
        writer.wait()
        writer._saver.settle(60)

    disturbed(go_on)
    assert read(tmp_path) == 2
    writer.close()


def test_what_is_deleted_while_it_is_verified_is_no_damage(tmp_path, monkeypatch):
    ce.save(tmp_path, state(1))
    original, pending = inspect._verify_file, [1]

    def verify_file(checkpoint, record):
        if pending:
            pending.pop()
            ce.save(tmp_path, state(2))
        return original(checkpoint, record)

    monkeypatch.setattr(inspect, "_verify_file", verify_file)
    assert inspect.verify(tmp_path) == []


@pytest.mark.parametrize("read", [load_arrays, load_into])
def test_a_file_that_is_lost_while_the_manifest_is_there_is_still_damage(tmp_path, disturbed, read):
    ce.save(tmp_path, state(1))
    disturbed(next(tmp_path.glob("data-*/rank-00000.zarr.zip")).unlink)
    with pytest.raises((CheckpointDamagedError, StorageError), match=r"rank-00000\.zarr\.zip"):
        read(tmp_path)


def test_a_checkpoint_that_is_deleted_for_good_while_it_is_read_is_not_found(tmp_path, disturbed):
    ce.save(tmp_path, state(1))

    def delete():
        (tmp_path / "manifest-0001.json").unlink()
        next(tmp_path.glob("data-*/rank-00000.zarr.zip")).unlink()

    disturbed(delete)
    with pytest.raises(CheckpointNotFoundError, match=str(tmp_path)):
        load_into(tmp_path)


@pytest.mark.parametrize("read", [load_arrays, load_into, restore])
def test_a_reader_that_a_writer_outruns_is_told_so(tmp_path, monkeypatch, read):
    writer, archive, steps = ce.Checkpointer(tmp_path, keep_last=1, preemption=None), Checkpoint.archive, count(1)

    def go_on(*_):
        writer.save(next(steps), {"number": 1, "a": np.ones(3)}).durable.result()
        writer._saver.settle(60)

    go_on()
    monkeypatch.setattr(Checkpoint, "archive", lambda self, rank: (go_on(), archive(self, rank))[1])
    with pytest.raises(StorageError, match=r"deleted faster than they can be read \(20 tries\).*keep_last=") as raised:
        read(tmp_path)
    # No error after which a job would begin anew with what it has: a state may have been filled in part.
    assert not isinstance(raised.value, FileNotFoundError)
    assert ("may have been overwritten: don't use it" in str(raised.value)) == (read is not load_arrays)
    writer.close()


WRITER = """
import itertools, sys
import numpy as np
import ckptengine as ce
for number in itertools.count(2):
    ce.save(sys.argv[1], {"a": np.full(1 << 18, number, np.float64), "b": {"c": np.full(1 << 18, number, np.int32)},
                          "number": number})
"""


def test_every_load_beside_a_process_that_keeps_replacing_the_checkpoint_is_whole(tmp_path):
    ce.save(tmp_path, state(1))
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) as writer:
        try:
            seen: list[int] = []
            until = time.monotonic() + 200
            while len(seen) < 120 or len(set(seen)) < 30:  # the writer takes its time to start
                assert time.monotonic() < until, f"the writer stands still: {len(set(seen))} versions in {len(seen)}"
                seen += [load_arrays(tmp_path), load_into(tmp_path)]
                assert writer.poll() is None
        finally:
            writer.kill()
    assert seen == sorted(seen)
