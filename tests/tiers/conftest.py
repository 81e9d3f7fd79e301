"""A run of four ranks with three checkpoints, on disk and in a bucket, and a small disk."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import Bucket
from launch import launch
from tier_files import RANKS, upload


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    launch(str(Path(__file__).parent / "run_job.py"), RANKS, folder, str(folder / "run"))
    return folder / "run"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.fixture
def uploaded(trained_run: Path, in_environment: Bucket) -> str:
    """The URL of the run in a bucket, which processes find through the environment."""
    upload(trained_run, in_environment)
    return f"{in_environment.url}/run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: one checkpoint of 13 MiB fits."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "ckptengine-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this needs the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder of this test's own in shared memory."""
    folder = Path("/dev/shm") / f"ckptengine-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
