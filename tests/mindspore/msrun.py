"""Starts jobs under msrun and collects what their ranks report."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).parents[2]


def environment(**more):
    """Return the environment of a child: one thread, this checkout's package, and this interpreter's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, "GLOG_v": "3", **more}


def msrun(script, ranks, folder, *arguments, until, timeout=240):
    """Run a script of this folder; return what the ranks wrote to `FOLDER/rank-N.json`, by rank.

    The job is ended when the ranks in `until` have reported: MindSpore's scheduler takes its time to notice that ranks
    have ended, half a minute for those that were killed.
    """
    job = _start(script, ranks, folder, *arguments)
    end = time.monotonic() + timeout
    try:
        while job.poll() is None and not all((folder / f"rank-{rank}.json").exists() for rank in until):
            assert time.monotonic() < end, f"{script} took more than {timeout} s"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    reports = {}
    for rank in range(ranks):
        file = folder / f"rank-{rank}.json"
        if file.exists():
            reports[rank] = json.loads(file.read_text())
    return reports


def msrun_to_its_end(script, ranks, folder, *arguments, until=None, timeout=240):
    """Run a script of this folder; return the exit code of msrun, None where the file `until` was there before."""
    job = _start(script, ranks, folder, *arguments)
    end = time.monotonic() + timeout
    try:
        while job.poll() is None and not (until and list(until.glob("manifest-*"))):
            assert time.monotonic() < end, f"{script} took more than {timeout} s"
            time.sleep(0.1)
        return job.poll()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _start(script, ranks, folder, *arguments):
    folder.mkdir(parents=True, exist_ok=True)
    command = ["msrun", f"--worker_num={ranks}", f"--local_worker_num={ranks}", f"--master_port={free_port()}"]
    command += ["--join=True", f"--log_dir={folder / 'log'}", str(ROOT / "tests/mindspore" / script), str(folder)]
    command += map(str, arguments)
    with (folder / "msrun.log").open("wb") as log:
        job = subprocess.Popen(command, env=environment(), cwd=folder, stdout=log, stderr=log, start_new_session=True)
    return job


def logs(folder):
    """Return the ends of what the workers said, for messages."""
    files = [folder / "msrun.log", *sorted((folder / "log").glob("*.log"))]
    return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files)
