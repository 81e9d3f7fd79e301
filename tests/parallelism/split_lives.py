"""Starts `gpt_split_job.py` under one split after the other, and reads the losses of its steps."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from ranks import run_ranks

JOB = Path(__file__).parent / "gpt_split_job.py"
STEPS = 12

Lives = list[tuple[str, int, int]]
"""Mode, number of ranks, and the step after which they are killed (0: they end)."""


def live(folder: Path, lives: Lives, **env: str) -> dict[int, list[list[float]]]:
    """Return, for each step, the losses of each time that it was trained."""
    folder.mkdir(exist_ok=True)
    for mode, ranks, kill in lives:
        done = run_ranks(ranks, JOB, folder, mode, STEPS, kill, env=env)
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stdout[-6000:]
    found: dict[int, list[list[float]]] = {}
    for line in (folder / "losses").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], []).append([float.fromhex(value) for value in record["losses"]])
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def worst(one: dict[int, list[list[float]]], other: dict[int, list[list[float]]]) -> float:
    """Return the largest relative difference of the mean loss of a step."""
    means = [{step: [sum(t) / len(t) for t in times] for step, times in losses.items()} for losses in (one, other)]
    return max(abs(a / b - 1) for step in means[0] for a in means[0][step] for b in means[1][step])
