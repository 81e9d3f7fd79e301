"""What the log tells of a run at the level INFO."""

import logging
import re

import numpy as np
import pytest

import ckptengine as ce


def test_a_few_lines_tell_the_life_of_a_run(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptengine")
    state = {"w": np.zeros(1000), "step": 0}
    for first in (1, 3):
        with ce.Checkpointer(tmp_path / "run", every=2, local=tmp_path / "local", preemption=None) as ckpt:
            ckpt.restore(state)
            for step in range(first, first + 2):
                ckpt.step(step, state)
    seconds = r"\d\S* s"
    run, local = (re.escape(str(tmp_path / name)) for name in ("run", "local"))
    saved = rf"{local}/step-0000000%d: committed, \S+ bytes by this rank; stall {seconds}, durable after {seconds}"
    expected = [
        rf"{run}: opened by 1 rank\(s\); no checkpoint yet",
        saved % 2,
        rf"{run}: step 2 is uploaded",
        rf"{run}: closed; the newest committed step is 2",
        rf"{run}: opened by 1 rank\(s\); the newest is step 2",
        rf"{run}: restored {local}/step-00000002 in {seconds}",
        saved % 4,
        rf"{run}: step 4 is uploaded",
        rf"{run}: closed; the newest committed step is 4",
    ]
    told = [record.getMessage() for record in caplog.records]
    # A save is accounted for at the next call, an upload at once.
    assert len(told) == len(expected)
    for pattern in expected:
        assert any(re.fullmatch(pattern, line) for line in told), (pattern, told)
