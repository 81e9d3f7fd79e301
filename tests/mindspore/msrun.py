"""Starts jobs under msrun and collects what their ranks report."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more):
    """Return the environment of a child: one thread, this checkout's package, and this interpreter's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, "GLOG_v": "3", **more}


def msrun(script, ranks, folder, *arguments, timeout=240):
    """Run a script of this folder; return the job, and what the ranks wrote to `FOLDER/rank-N.json` by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["msrun", f"--worker_num={ranks}", f"--local_worker_num={ranks}", f"--master_port={port}"]
    command += ["--join=True", f"--log_dir={folder / 'log'}", str(ROOT / "tests/mindspore" / script), str(folder)]
    job = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    reports = {}
    for rank in range(ranks):
        file = folder / f"rank-{rank}.json"
        if file.exists():
            reports[rank] = json.loads(file.read_text())
    return job, reports


def logs(folder):
    """Return the ends of what the workers said, for messages."""
    return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted((folder / "log").glob("*.log")))
