"""Starts jobs with tiers, and kills them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from launch import launch
from ranks import Job

JOB = str(Path(__file__).parent / "tiers_job.py")


def finish(ranks: int, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Run a job to its end and return the ranks' reports."""
    return launch(JOB, ranks, folder, json.dumps(options))


class Running:
    """A job that is killed when the test has seen enough."""

    def __init__(self, ranks: int, folder: Path, **options: Any) -> None:
        self.ranks, self.folder = ranks, folder
        for old in folder.glob("at-*"):
            old.unlink()
        self.job = Job(ranks, JOB, folder, json.dumps(options))

    def wait_for(self, step: int, timeout: float = 120) -> None:
        """Wait until all ranks are past a step."""
        end = time.monotonic() + timeout
        while len(list(self.folder.glob(f"at-{step}.*"))) < self.ranks:
            ended = any(rank.poll() is not None for rank in self.job.ranks)
            if ended or time.monotonic() > end:
                raise AssertionError(self.job.printed()[-4000:])
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill all of its processes at once."""
        self.job.kill()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
