"""A run whose claim of a generation failed after it had come to be, in this version and in earlier ones."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path

import pytest
from cli_run import Call
from committed_steps import state_of
from committed_steps import steps_in as steps

import ckptengine as ce
from ckptengine.storage.disk import Disk
from ckptengine.storage.local import LocalStorage
from ckptengine.tiers.memory import memory_root


def test_a_directory_sync_that_fails_just_after_the_claim_does_not_split_the_run(tmp_path, monkeypatch, caplog):
    failed = []
    sync = Disk.sync_directory

    def failing(self, path):
        sync(self, path)
        if path == str(tmp_path / "run") and (tmp_path / "run" / "generation-0001.json").exists() and not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Disk, "sync_directory", failing)
    places = {"run": tmp_path / "run", "local": tmp_path / "local", "preemption": None}
    with ce.Checkpointer(**places) as ckpt:
        ckpt.save(1, state_of(1)).durable.result()
        ckpt.flush()
    assert failed
    assert steps(tmp_path / "run") == [1]
    with ce.Checkpointer(**places) as again:
        assert again.restore(state_of(0)) == 1


def split(tmp_path: Path, memory: Path | None = None) -> Path:
    """Make what earlier versions left: the claim of the run is not that of the local tier, and nothing came there."""
    places = {"run": tmp_path / "run", "local": tmp_path / "local", "preemption": None}
    with ce.Checkpointer(**places) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).durable.result()
            ckpt.flush()
    claim = tmp_path / "run" / "generation-0001.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"id": "0123456789abcdef"}, sort_keys=True))
    for path in (tmp_path / "run").glob("step-*/manifest-*"):
        path.unlink()
    return claim


def test_a_split_run_is_mended_by_the_command_that_the_error_names(tmp_path, call: Call):
    split(tmp_path)
    places = {"run": tmp_path / "run", "local": tmp_path / "local", "preemption": None}
    with pytest.raises(ce.errors.StorageError, match="`ckptengine mend RUN DIRECTORY`"):
        ce.Checkpointer(**places)
    result = call("mend", tmp_path / "run", tmp_path / "local")
    assert result.exit_code == 0, result.output
    with ce.Checkpointer(**places) as again:
        state = state_of(0)
        assert again.restore(state) == 2
        assert state["w"][0] == 2
        again.save(3, state_of(3))
    assert steps(tmp_path / "run") == [2, 3]
    assert "nothing to mend" in call("mend", tmp_path / "run", tmp_path / "local").output


def test_nothing_is_mended_beside_a_job_that_writes_to_the_run(tmp_path, call: Call):
    claim = split(tmp_path)
    before = claim.read_bytes()
    with ce.Checkpointer(tmp_path / "run", preemption=None) as job:
        job.save(9, state_of(9)).durable.result()
        result = call("mend", tmp_path / "run", tmp_path / "local")
        assert result.exit_code == 2
        assert re.search(
            rf"is in use: process {os.getpid()} on .*Call `ckptengine mend` while no job writes", result.output
        )
        assert claim.read_bytes() == before
    # One that has died on another machine: known as gone when its lease has run out.
    writer = tmp_path / "run" / "writer.json"
    writer.write_text(json.dumps({"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 1, "started": "1"}))
    assert call("mend", tmp_path / "run", tmp_path / "local").exit_code == 2
    assert claim.read_bytes() == before
    os.utime(writer, (time.time() - 60,) * 2)
    assert call("mend", tmp_path / "run", tmp_path / "local").exit_code == 0
    assert claim.read_bytes() != before


def test_two_runs_are_not_made_one(tmp_path, call: Call):
    claim = split(tmp_path)
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"pid": 1}))
    before = claim.read_bytes()
    result = call("mend", tmp_path / "run", tmp_path / "local")
    assert result.exit_code == 2
    assert "two runs" in result.output
    assert claim.read_bytes() == before


def test_places_of_several_nodes_come_to_the_same_claim_in_any_order(tmp_path, call: Call):
    claim = split(tmp_path)
    node = tmp_path / "node"
    node.mkdir()
    (node / claim.name).write_bytes(claim.read_bytes())
    for _ in range(2):
        for place in ("local", "node"):
            assert call("mend", tmp_path / "run", tmp_path / place).exit_code == 0
    assert len({(tmp_path / place / claim.name).read_bytes() for place in ("run", "local", "node")}) == 1


def test_a_refused_disk_costs_nothing_that_lies_in_memory(tmp_path, memory):
    places = {"run": tmp_path / "run", "local": tmp_path / "local", "memory": memory, "preemption": None}
    ckpt = ce.Checkpointer(**places)
    ckpt.save(1, state_of(1)).durable.result()
    ckpt._saver.settle(60)
    ckpt._tiers.forget()  # as if it had died
    kept = memory_root(str(tmp_path / "run"), memory)
    assert steps(kept) == [1]
    claim = tmp_path / "run" / "generation-0001.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"id": "0123456789abcdef"}, sort_keys=True))
    with pytest.raises(ce.errors.StorageError, match="mend"):
        ce.Checkpointer(**places)
    assert steps(kept) == [1]


def test_a_restored_checkpoint_is_uploaded_after_a_life_that_claimed_and_died(tmp_path):
    places = {"run": tmp_path / "run", "local": tmp_path / "local", "preemption": None}
    with ce.Checkpointer(**places) as ckpt:
        ckpt.save(1, state_of(1))
    for path in (tmp_path / "run").glob("step-*/manifest-*"):
        path.unlink()  # as if it had never come there
    died = ce.Checkpointer(**places)
    assert died._tiers.claims.claim((1, 1)) == 2
    died._tiers.stop()
    with ce.Checkpointer(**places, timeout=30) as again:
        assert again.restore(state_of(0)) == 1
        again.flush()
        assert steps(tmp_path / "run") == [1]
        again.save(2, state_of(2))
    assert steps(tmp_path / "run") == [1, 2]


def test_one_failed_read_of_what_was_just_committed_does_not_cost_its_upload(tmp_path, monkeypatch):
    failed = []
    read = LocalStorage.read_bytes

    def failing(self, name, limit):
        if not failed and self.root == tmp_path / "local" and "manifest-" in name:
            failed.append(name)
            raise ce.errors.StorageError(errno.EIO, f"cannot read {self.location(name)}: Input/output error")
        return read(self, name, limit)

    monkeypatch.setattr(LocalStorage, "read_bytes", failing)
    with ce.Checkpointer(tmp_path / "run", local=tmp_path / "local", preemption=None) as ckpt:
        ckpt.save(1, state_of(1))
    assert failed
    assert steps(tmp_path / "run") == [1]
