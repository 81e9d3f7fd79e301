"""A run with three checkpoints of a small state."""

import shutil
from pathlib import Path

import pytest
from cli_run import state

import ckptengine as ce


@pytest.fixture(scope="session")
def original_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "gpt"
    with ce.Checkpointer(str(run), every=10) as checkpointer:
        assert checkpointer.restore(state(0)) is None
        for step in (10, 20, 30):
            checkpointer.step(step, state(step))
    return run


@pytest.fixture
def run(original_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "gpt"
    shutil.copytree(original_run, copy)
    return copy
