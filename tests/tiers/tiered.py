"""Starts jobs with tiers, and kills them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch import ROOT, environment, launch

from ckptengine.catalog.listing import committed
from ckptengine.storage.local import LocalStorage

JOB = str(Path(__file__).parent / "tiers_job.py")


def finish(ranks: int, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Run a job to its end and return the ranks' reports."""
    return launch(JOB, ranks, folder, json.dumps(options))


def steps(folder: Path | str) -> list[int | None]:
    """Return the committed steps in a directory."""
    return [entry.step for entry in committed(LocalStorage(folder))]


class Running:
    """A job that is killed, launcher and ranks together, when the test has seen enough."""

    def __init__(self, ranks: int, folder: Path, **options: Any) -> None:
        self.ranks, self.folder = ranks, folder
        for old in folder.glob("at-*"):
            old.unlink()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, JOB, str(folder), json.dumps(options)],
                env=environment(),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, step: int, timeout: float = 120) -> None:
        """Wait until all ranks are past a step."""
        end = time.monotonic() + timeout
        while len(list(self.folder.glob(f"at-{step}.*"))) < self.ranks:
            assert self.process.poll() is None, self.output.read_text()[-4000:]
            assert time.monotonic() < end, self.output.read_text()[-4000:]
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill all of its processes at once; the ranks are in sessions of their own under torchrun."""
        victims = [self.process.pid, *_children(self.process.pid)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(_alive(pid) for pid in victims):
            time.sleep(0.01)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def _children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
