"""What `on_commit` is called with, when, and what it can't harm."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks

import ckptengine as ce

STATE = {"w": np.arange(1000.0)}


def test_it_is_called_with_each_commit_and_can_load_it(tmp_path: Path) -> None:
    calls: list[ce.Commit] = []

    def load(commit: ce.Commit) -> None:
        assert np.array_equal(ce.load(commit.path)["w"], STATE["w"])
        calls.append(commit)

    with ce.Checkpointer(tmp_path / "run", every=1, on_commit=load) as ckpt:
        for step in range(1, 4):
            ckpt.step(step, STATE, metrics={"loss": 1 / step})
            ckpt.wait()
    assert [(call.step, dict(call.metrics), call.persistent) for call in calls] == [
        (step, {"loss": 1 / step}, True) for step in (1, 2, 3)
    ]
    assert all(call.stats is not None and call.stats.step == call.step for call in calls)


def test_with_a_local_tier_it_is_called_again_when_the_checkpoint_has_been_uploaded(tmp_path: Path) -> None:
    calls: list[ce.Commit] = []
    with ce.Checkpointer(tmp_path / "run", local=tmp_path / "local", on_commit=calls.append) as ckpt:
        ckpt.save(1, STATE, metrics={"loss": 2.0})
    assert [(call.persistent, Path(call.path)) for call in calls] == [
        (False, tmp_path / "local" / "step-00000001"),
        (True, tmp_path / "run" / "step-00000001"),
    ]
    assert [dict(call.metrics) for call in calls] == [{"loss": 2.0}] * 2


def test_a_checkpoint_is_not_deleted_while_it_is_read(tmp_path: Path) -> None:
    goes_on, loaded = threading.Event(), []

    def slow(commit: ce.Commit) -> None:
        assert goes_on.wait(60)
        loaded.append((commit.step, ce.load(commit.path)["w"].sum()))

    with ce.Checkpointer(tmp_path / "run", keep_last=1, on_commit=slow) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, STATE)
            ckpt.wait()
        ckpt._saver.settle(60)  # what deletes old checkpoints has been done
        goes_on.set()
        assert not ckpt._settings.hooks.settle(60)
        assert loaded == [(step, STATE["w"].sum()) for step in (1, 2, 3)]
        ckpt.save(4, STATE)
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000004"]


@pytest.mark.parametrize("problem", [ValueError("no such registry"), SystemExit(3)])
def test_what_it_raises_is_logged_and_the_training_goes_on(
    tmp_path: Path, problem: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(commit: ce.Commit) -> None:
        raise problem

    with ce.Checkpointer(tmp_path / "run", on_error="raise", on_commit=fail) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE)
    told = [record.getMessage() for record in caplog.records if "on_commit failed" in record.getMessage()]
    assert len(told) == 2
    assert "step-00000001: on_commit failed; the checkpoint is not affected" in told[0]
    assert ce.load(tmp_path / "run", step=2)["w"].size == 1000


def test_where_it_is_too_slow_the_oldest_waiting_commits_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on, begun, steps = threading.Event(), threading.Event(), []

    def slow(commit: ce.Commit) -> None:
        begun.set()
        assert goes_on.wait(60)
        steps.append(commit.step)

    with caplog.at_level(logging.WARNING), ce.Checkpointer(tmp_path / "run", on_commit=slow) as ckpt:
        for step in range(1, 12):
            ckpt.save(step, STATE)
            ckpt.wait()
            assert begun.wait(60)
        goes_on.set()
    assert steps == [1, *range(4, 12)]
    told = [record.getMessage() for record in caplog.records]
    assert sum("on_commit is slower than the saves" in line for line in told) == 2


def test_only_a_function_is_taken(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="on_commit=3: give a function"):
        ce.Checkpointer(tmp_path / "run", on_commit=3)  # type: ignore[arg-type]


def rank_of_a_job(run: Path, told: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with ce.Checkpointer(run, on_commit=lambda commit: (told / f"{rank}-{commit.step}").touch()) as ckpt:
        ckpt.save(1, STATE)
    dist.destroy_process_group()


def test_of_several_ranks_it_is_called_on_rank_0_alone(tmp_path: Path) -> None:
    (tmp_path / "told").mkdir()
    job = run_ranks(2, __file__, tmp_path / "run", tmp_path / "told")
    assert job.returncode == 0, job.stdout
    assert [path.name for path in (tmp_path / "told").iterdir()] == ["0-1"]


if __name__ == "__main__":
    rank_of_a_job(Path(sys.argv[1]), Path(sys.argv[2]))
