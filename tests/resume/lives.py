"""Starts `gpt_job.py` under torchrun, kills it, and reads what its ranks wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class Life:
    """One start of the job: torchrun's agent and its ranks."""

    def __init__(self, folder: Path, ranks: int, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._log = folder / "torchrun.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(HERE / "gpt_job.py"), str(folder), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self._log.open("ab") as log:
            self._agent = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def finish(self, timeout: float = 200) -> None:
        """Wait for the job's good end."""
        try:
            code = self._agent.wait(timeout)
        except psutil.TimeoutExpired:
            self.kill()
            raise
        assert code == 0, self._log.read_text(errors="replace")[-6000:]

    def kill(self) -> None:
        """Send SIGKILL to the agent and all its descendants, and wait until they are dead."""
        family = [self._agent, *self._agent.children(recursive=True)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)

    def kill_when(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Kill as soon as something holds, which must be before the job's end."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self._agent.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError("the moment never came: " + self._log.read_text(errors="replace")[-6000:])
            time.sleep(0.005)
        self.kill()


def events(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return a rank's lines over all lives; the last of a killed life may be torn and is left out."""
    path = folder / f"rank-{rank}.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def steps_of(folder: Path, rank: int) -> dict[int, list[dict[str, Any]]]:
    """Return all records of each step that a rank trained, in order: more than one where it was trained again."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in events(folder, rank):
        if event["event"] == "step":
            found.setdefault(event["step"], []).append(event)
    return found


def starts(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return the record of each start that came through its restore."""
    return [event for event in events(folder, rank) if event["event"] == "start"]


def final(folder: Path, rank: int) -> dict[str, Any]:
    """Return what a rank had at the end."""
    result: dict[str, Any] = json.loads((folder / f"final-{rank}.json").read_text())
    return result
