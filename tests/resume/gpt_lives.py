"""Starts `gpt_job.py` on several ranks, kills it, and reads what its ranks wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import Job

HERE = Path(__file__).parent


class Life:
    """One start of the job."""

    def __init__(self, folder: Path, ranks: int, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._job = Job(ranks, HERE / "gpt_job.py", folder, *arguments)

    def finish(self, timeout: float = 200) -> None:
        """Wait for the job's good end."""
        code = self._job.wait(timeout)
        assert code == 0, self._job.printed()[-6000:]

    def kill_when(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Kill as soon as something holds, which must be before the job's end."""
        deadline = time.monotonic() + timeout
        with self._job as job:
            while not condition():
                ended = any(rank.poll() is not None for rank in job.ranks)
                if ended or time.monotonic() > deadline:
                    raise AssertionError("the moment never came: " + job.printed()[-6000:])
                time.sleep(0.005)


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
