"""What an interrupt in the middle of a save does: the attempt fails on all ranks at once, and nobody waits for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
from interrupted_job import signal_in_the_next_copy, state
from ranks import run_ranks

import ckptengine as ce
from ckptengine.errors import CheckpointError
from ckptengine.inspect import list_run

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}


def steps_in(run: Path) -> list[int | None]:
    return [one.step for one in list_run(run)]


def test_ctrl_c_in_a_copy_ends_the_process_as_it_would_without_us(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "interrupted_job.py"), "ctrl-c", str(tmp_path)]
    job = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
    assert job.returncode == -signal.SIGINT, job.stderr
    assert "KeyboardInterrupt" in job.stderr
    assert steps_in(tmp_path / "run") == [1]


def test_sys_exit_in_a_copy_keeps_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "interrupted_job.py"), "exit", str(tmp_path)]
    job = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
    assert job.returncode == 3, job.stderr
    assert steps_in(tmp_path / "run") == [1]


@pytest.mark.parametrize("victim", [0, 1])
def test_ctrl_c_on_one_rank_fails_the_save_on_all_at_once_and_the_next_one_works(victim: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    job = run_ranks(2, HERE / "interrupted_job.py", "ranks", tmp_path, victim)
    assert job.returncode == 0, job.stdout[-8000:]
    said = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[victim]["2"].startswith("KeyboardInterrupt")
    assert said[1 - victim]["2"].startswith("SaveFailedError")
    assert f"rank {victim}: it was interrupted by KeyboardInterrupt" in said[1 - victim]["2"]
    assert float(said[1 - victim]["seconds 2"]) < 50, "the other rank must not wait for its timeout"
    assert [one["3"] for one in said] == ["", ""]
    assert steps_in(tmp_path / "run") == [1, 3]


def test_a_save_in_a_signal_handler_that_interrupted_a_save_is_refused_at_once(tmp_path: Path) -> None:
    refused: list[CheckpointError] = []
    with ce.Checkpointer(tmp_path, every=1, preemption=None) as ckpt:

        def handler(number: int, frame: FrameType | None) -> None:
            for call in (lambda: ckpt.save(7, state(7)), lambda: ckpt.step(8, state(8)), ckpt.close):
                with pytest.raises(CheckpointError, match="while this thread is inside of it already") as raised:
                    call()
                refused.append(raised.value)

        before = signal.signal(signal.SIGUSR2, handler)
        try:
            ckpt.step(1, state(1))
            signal_in_the_next_copy(signal.SIGUSR2)
            ckpt.step(2, state(2))
        finally:
            signal.signal(signal.SIGUSR2, before)
        ckpt.step(3, state(3))
    assert len(refused) == 3
    assert steps_in(tmp_path) == [1, 2, 3]


def test_single_saves_refuse_it_too(tmp_path: Path) -> None:
    refused: list[CheckpointError] = []

    def handler(number: int, frame: FrameType | None) -> None:
        with pytest.raises(CheckpointError, match="a save was called while this thread is inside") as raised:
            ce.save(tmp_path / "inner", state(2))
        refused.append(raised.value)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        signal_in_the_next_copy(signal.SIGUSR2)
        ce.save(tmp_path / "outer", state(1))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(refused) == 1
    assert ce.load(tmp_path / "outer")["step"] == 1
    assert not (tmp_path / "inner").exists()
