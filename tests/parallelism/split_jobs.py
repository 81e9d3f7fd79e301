"""Starts the jobs of this folder and collects what their ranks report."""

from __future__ import annotations

import json
from pathlib import Path

from ranks import run_ranks

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'engine'}"}

__all__ = ["die", "launch"]


def launch(script: str, ranks: int, folder: Path, *arguments: str, timeout: float = 280) -> list[dict]:
    """Run a script of this folder on so many ranks; return what each rank wrote to `FOLDER/rank-N.json`."""
    job = run_ranks(ranks, HERE / script, folder, *arguments, env=PATHS, timeout=timeout)
    assert job.returncode == 0, job.stdout[-8000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def die(script: str, ranks: int, folder: Path, *arguments: str, timeout: float = 280) -> None:
    """Run a script of which one rank kills itself."""
    job = run_ranks(ranks, HERE / script, folder, *arguments, env=PATHS, timeout=timeout)
    assert job.returncode == -9, job.stdout[-8000:]
