"""Metrics in the manifest: what is kept for them, restored by them, and shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import Call
from committed_steps import state_of, steps_in

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError, StorageError
from ckptengine.storage.local import LocalStorage

LOSSES = {1: 0.9, 2: 0.4, 3: 0.7, 4: 0.4, 5: float("nan"), 6: 0.8}


def train(run: Path, **options: object) -> None:
    with ce.Checkpointer(run, every=1, preemption=None, **options) as checkpointer:
        for step, loss in LOSSES.items():
            checkpointer.step(step, state_of(step), metrics={"loss": torch.tensor(loss), "accuracy": 1 - loss})
            if "local" in options:
                checkpointer.flush()  # none is overtaken on its way


def test_the_best_by_a_metric_is_kept_beside_the_newest_and_of_equal_ones_the_newer(tmp_path: Path) -> None:
    train(tmp_path, keep_last=1, keep_best="loss")
    assert steps_in(tmp_path) == [4, 6]


def test_several_metrics_have_rules_of_their_own(tmp_path: Path) -> None:
    train(tmp_path, keep_last=1, keep_best=["loss", ce.Best("loss", mode="max"), ce.Best("accuracy", 2, "max")])
    assert steps_in(tmp_path) == [1, 2, 4, 6]


def test_without_keep_last_a_best_deletes_nothing(tmp_path: Path) -> None:
    train(tmp_path, keep_best="loss")
    assert steps_in(tmp_path) == list(LOSSES)


def test_the_best_is_restored_and_what_came_after_it_is_a_branch_that_was_given_up(tmp_path: Path) -> None:
    train(tmp_path)
    state = state_of(0)
    with ce.Checkpointer(tmp_path, preemption=None) as checkpointer:
        assert checkpointer.restore(state, best="loss") == 4
        assert state["step"] == 4
        checkpointer.save(5, state_of(5)).durable.result()
    with ce.Checkpointer(tmp_path, preemption=None) as checkpointer:
        assert checkpointer.restore(state_of(0), best=ce.Best("accuracy", mode="max")) == 4
        assert checkpointer.restore(state_of(0), best=ce.Best("loss", mode="max")) == 1


def test_a_metric_that_no_checkpoint_has_is_an_error_that_names_those_that_are_there(tmp_path: Path) -> None:
    train(tmp_path)
    with (
        ce.Checkpointer(tmp_path, preemption=None) as checkpointer,
        pytest.raises(
            CheckpointNotFoundError, match="no checkpoint has the metric 'los'; their metrics are accuracy, lo"
        ),
    ):
        checkpointer.restore(state_of(0), best="los")


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    with (
        ce.Checkpointer(tmp_path, preemption=None) as checkpointer,
        pytest.raises(TypeError, match=r"metrics\['loss'\] is a str: give a number"),
    ):
        checkpointer.save(1, state_of(1), metrics={"loss": "0.1"})


def test_the_command_shows_metrics_and_keeps_the_best(tmp_path: Path, call: Call) -> None:
    train(tmp_path)
    listed = json.loads(call("ls", tmp_path, "--json").stdout)
    assert [one["metrics"]["loss"] for one in listed] == pytest.approx([0.9, 0.4, 0.7, 0.4, None, 0.8], nan_ok=False)
    assert "0.7" in call("ls", tmp_path).stdout
    assert "metrics.accuracy" in call("show", f"{tmp_path}/step-3").stdout
    assert call("gc", tmp_path, "--keep-last", "1", "--keep-best", "loss", "--keep-step", "2").exit_code == 0
    assert steps_in(tmp_path) == [2, 4, 6]


def test_a_manifest_that_can_not_be_read_now_is_not_taken_for_one_that_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    read, failures = LocalStorage.read_bytes, [1]

    def fails_once(storage: LocalStorage, name: str, *more: object) -> bytes:
        if "step-00000004/manifest" in name and failures and failures.pop():
            raise StorageError(5, f"{name}: Input/output error")
        return read(storage, name, *more)

    with ce.Checkpointer(tmp_path, preemption=None) as checkpointer:
        monkeypatch.setattr(LocalStorage, "read_bytes", fails_once)
        with pytest.raises(StorageError, match="Input/output"):
            checkpointer.restore(state_of(0), best="loss")
        assert checkpointer.restore(state_of(0), best="loss") == 4


@pytest.mark.parametrize("choice", [{"step": 4}, {"best": "loss"}])
def test_a_manifest_that_is_damaged_in_one_tier_is_read_in_another(tmp_path: Path, choice: dict[str, Any]) -> None:
    train(tmp_path / "run", local=tmp_path / "local")
    (manifest,) = (tmp_path / "local").glob("step-00000004/manifest-*")
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with ce.Checkpointer(tmp_path / "run", local=tmp_path / "local", preemption=None) as checkpointer:
        assert checkpointer.restore(state_of(0), **choice) == 4


def test_where_all_manifests_are_damaged_the_best_is_an_error_too(tmp_path: Path) -> None:
    train(tmp_path)
    for manifest in tmp_path.glob("step-*/manifest-*"):
        manifest.chmod(0o644)
        manifest.write_bytes(b"{")
    with (
        ce.Checkpointer(tmp_path, preemption=None) as checkpointer,
        pytest.raises(CheckpointDamagedError),
    ):
        checkpointer.restore(state_of(0), best="loss")


def test_metrics_for_a_step_that_is_saved_already_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ce.Checkpointer(tmp_path, every=1, preemption=None) as checkpointer:
        checkpointer.step(1, state_of(1))
        checkpointer.save(1, state_of(1), metrics={"loss": 0.3})
    assert "step 1 of" in caplog.text
    assert "these metrics are not stored" in caplog.text
