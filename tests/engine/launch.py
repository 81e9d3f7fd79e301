"""Starts jobs of several real processes and collects what their ranks report."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ranks import run_ranks

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a child: one thread, and this checkout's package."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def launch(script: str, ranks: int, folder: Path, *arguments: str, timeout: float = 280) -> list[dict]:
    """Run a script of this folder on so many ranks; return what each rank wrote to `FOLDER/rank-N.json`."""
    job = run_ranks(ranks, HERE / script, folder, *arguments, timeout=timeout)
    assert job.returncode == 0, job.stdout[-8000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
