"""What a Checkpointer restores: the newest valid one, and what it says of those that are not."""

import hashlib
import json
import logging

import numpy as np
import pytest
from short_runs import archive, blank, file_of, restored, save_steps, state_at, steps_in

import ckptengine as ce
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    FormatVersionError,
    LoadMismatchError,
)


def test_nothing_there_restores_nothing(tmp_path):
    state = blank()
    with ce.Checkpointer(tmp_path / "new" / "run") as ckpt:
        assert ckpt.restore(state) is None
        with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint of step 3"):
            ckpt.restore(state, step=3)
    assert state["step"] == -1


def test_the_newest_is_by_generation_then_step(tmp_path):
    save_steps(tmp_path, [80, 90, 100])
    with ce.Checkpointer(tmp_path) as ckpt:
        assert ckpt.restore(blank(), step=90) == 90
        for step in (91, 92):
            ckpt.save(step, state_at(step))
    assert steps_in(tmp_path) == [80, 90, 91, 92, 100]
    assert restored(tmp_path) == 92
    manifest = json.loads(file_of(tmp_path, 91, "manifest-0002.json").read_text())
    assert (manifest["generation"], manifest["parent"]) == (2, [1, 90])
    # Damage on the new branch leads along the parents, past the abandoned 100.
    for step in (91, 92):
        archive(tmp_path, step).unlink()
    assert restored(tmp_path) == 90


def flip(run, step):
    path = archive(run, step)
    data = bytearray(path.read_bytes())
    data[data.index(np.float64(step + 1500.0).tobytes())] ^= 0x40
    path.write_bytes(data)


def truncate(run, step):
    path = archive(run, step)
    path.write_bytes(path.read_bytes()[:-100])


def delete_archive(run, step):
    archive(run, step).unlink()


def delete_layout(run, step):
    file_of(run, step, "data-*/layout.zarr.zip").unlink()


def flip_layout(run, step):
    path = file_of(run, step, "data-*/layout.zarr.zip")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_tail(run, step):
    path = archive(run, step)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"zarr.json")] ^= 1
    path.write_bytes(data)


def garble_manifest(run, step):
    file_of(run, step, "manifest-0001.json").write_text("this is not JSON {")


def empty_manifest(run, step):
    file_of(run, step, "manifest-0001.json").write_bytes(b"")


def change_manifest(run, step):
    path = file_of(run, step, "manifest-0001.json")
    path.write_text(path.read_text().replace('"world_size":1', '"world_size":2'))


DAMAGES = [
    flip,
    truncate,
    delete_archive,
    delete_layout,
    flip_layout,
    flip_tail,
    garble_manifest,
    empty_manifest,
    change_manifest,
]


def test_a_job_that_forgets_to_restore_is_warned_once(tmp_path, caplog):
    save_steps(tmp_path, [5, 6])
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(tmp_path, every=1) as ckpt:
        for step in (1, 2):
            ckpt.step(step, state_at(step))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "the newest of step 6" in message
    assert "Call restore(state) before the first step" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(tmp_path, every=1) as ckpt:
        assert ckpt.restore(blank()) == 2
        ckpt.step(3, state_at(3))
    assert not caplog.records


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_is_reported_and_replaced(damage, tmp_path, caplog):
    save_steps(tmp_path, [80, 90, 100])
    damage(tmp_path, 100)
    with pytest.raises(CheckpointDamagedError, match="step-00000100"):
        ce.load(tmp_path, into=blank())
    with pytest.raises(CheckpointDamagedError, match="step-00000100"):
        ce.load(tmp_path)
    state = blank()
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(tmp_path, timeout=20) as ckpt:
        assert ckpt.restore(state) == 90
        assert any("step-00000100" in record.getMessage() for record in caplog.records)
        assert np.array_equal(state["a"], state_at(90)["a"])
        ckpt.save(100, state_at(100)).durable.result(20)
        assert ckpt.restore(state) == 100
    assert restored(tmp_path) == 100
    # Older ones are still there, and what was damaged is not in the way of what comes.
    assert restored(tmp_path, step=80) == 80
    assert save_steps(tmp_path, [110], keep_last=1) == [110]
    assert restored(tmp_path) == 110


def test_where_all_are_damaged_the_error_names_each(tmp_path):
    save_steps(tmp_path, [1, 2])
    delete_layout(tmp_path, 1)
    flip(tmp_path, 2)
    with (
        ce.Checkpointer(tmp_path) as ckpt,
        pytest.raises(CheckpointDamagedError, match="no checkpoint is complete.*step-00000002.*step-00000001"),
    ):
        ckpt.restore(blank())


def test_a_step_asked_for_that_is_damaged_is_an_error(tmp_path):
    save_steps(tmp_path, [1, 2])
    flip(tmp_path, 2)
    with ce.Checkpointer(tmp_path) as ckpt, pytest.raises(CheckpointDamagedError, match="step-00000002"):
        ckpt.restore(blank(), step=2)
    assert restored(tmp_path, step=1) == 1


def test_a_newer_format_is_an_error_and_not_skipped(tmp_path):
    save_steps(tmp_path, [1, 2])
    path = file_of(tmp_path, 2, "manifest-0001.json")
    document = json.loads(path.read_text())
    document["format_version"] = 99
    del document["sha256"]
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    document["sha256"] = hashlib.sha256(canonical).hexdigest()
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")))
    with ce.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(FormatVersionError, match="99.*upgrade ckptengine"):
            ckpt.restore(blank())
        assert ckpt.restore(blank(), step=1) == 1
    with pytest.raises(FormatVersionError, match="manifest-0001.json"):
        ce.load(tmp_path)


def test_a_state_that_does_not_fit_is_not_taken_for_damage(tmp_path):
    save_steps(tmp_path, [1, 2])
    with ce.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(LoadMismatchError, match=r"step-00000002: (?s:.*)a: shape \(2,\) here, \(3000,\)"):
            ckpt.restore({"a": np.zeros(2), "step": 0})
        target = np.full(3000, -1.0)
        with pytest.raises(LoadMismatchError, match="missing in the checkpoint"):
            ckpt.restore({"a": target, "step": 0, "more": 1})
        assert (target == -1).all()  # nothing is read before everything fits
        assert ckpt.restore({"a": target}, only="a") == 2
        assert np.array_equal(target, state_at(2)["a"])
