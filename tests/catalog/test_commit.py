"""The publication of a manifest, where its writer stood still before it or the disk fails after it."""

import errno
import os

import numpy as np
import pytest
from checkpoints import directory_of, manifest_of, write_checkpoint, write_data

import ckptengine as ce
from ckptengine.catalog.commit import publish
from ckptengine.catalog.lease import LEASE_SECONDS
from ckptengine.catalog.listing import committed
from ckptengine.catalog.retention import remove_leftovers
from ckptengine.errors import SaveFailedError
from ckptengine.storage.disk import Disk


def test_a_writer_that_stood_still_and_was_swept_before_its_publication_takes_it_back(storage, monkeypatch):
    write_checkpoint(storage, 10)
    manifest = manifest_of(20)
    write_data(storage, manifest)
    link = Disk.publish

    def stand_still(self, source, target):
        then = os.stat(source).st_mtime - LEASE_SECONDS - 60
        for path in (storage.root / "step-00000020").rglob("data-*"):
            os.utime(path, (then, then))
        assert remove_leftovers(storage) == []
        return link(self, source, target)

    monkeypatch.setattr(Disk, "publish", stand_still)
    with pytest.raises(SaveFailedError, match=r"rank-00000.zarr.zip is missing|layout.zarr.zip is missing"):
        publish(storage, directory_of(manifest), manifest)
    assert [entry.step for entry in committed(storage)] == [10]


def test_a_run_whose_newest_data_is_missing_is_loaded_from_the_one_before(tmp_path, caplog):
    with ce.Checkpointer(tmp_path / "run", preemption=None) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"w": np.full(10, float(step))}).durable.result()
    for path in (tmp_path / "run" / "step-00000002").glob("data-*/*.zip"):
        path.unlink()
    assert ce.load(tmp_path / "run")["w"][0] == 1
    state = {"w": np.zeros(10)}
    ce.load(tmp_path / "run", into=state)
    assert state["w"][0] == 1
    assert "step-00000001 is loaded; a newer checkpoint has a manifest but no data" in caplog.text
    for path in (tmp_path / "run" / "step-00000001").glob("data-*/*.zip"):
        path.unlink()
    with pytest.raises(ce.errors.CheckpointDamagedError, match="step-00000002"):
        ce.load(tmp_path / "run")


def test_a_temporary_name_that_cannot_be_removed_fails_no_save(tmp_path, monkeypatch):
    unlink = os.unlink

    def failing(path, *arguments, **options):
        if ".tmp-manifest" in os.fspath(path):
            raise OSError(errno.EIO, "Input/output error", path)
        unlink(path, *arguments, **options)

    monkeypatch.setattr("ckptengine.storage.disk.os.unlink", failing)
    with ce.Checkpointer(tmp_path / "run", preemption=None) as ckpt:
        ckpt.save(1, {"w": np.zeros(10)}).durable.result()
    assert len(list((tmp_path / "run").rglob(".tmp-manifest*"))) == 1
    monkeypatch.undo()
    assert ce.load(tmp_path / "run")["w"].size == 10
