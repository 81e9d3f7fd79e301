"""Measurements in processes of their own, with a time-out for each."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def fresh(
    module: str,
    arguments: dict[str, Any],
    folder: Path,
    timeout: float,
    watch: Callable[[int], None] | None = None,
    launcher: tuple[str, ...] = (),
) -> Any:
    """Run `python -m module` in a new process and return the value that it gives to `answer`.

    `watch` is called with the process's id again and again while it runs. `launcher` are arguments that come between
    `python` and `-m module`, such as those of torchrun. After `timeout` seconds the process and its children are
    killed. Raises `TimeoutError`, or `RuntimeError` with the last lines that it printed where it failed.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="process-") as scratch:
        answer_file, log_file = Path(scratch, "answer.json"), Path(scratch, "log")
        job = json.dumps({**arguments, "answer": str(answer_file)})
        command = [sys.executable, *launcher, "-m", module, job]
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
            try:
                _wait(process, time.monotonic() + timeout, watch, f"{module} took more than {timeout:g} s")
            finally:
                _end(process)
        if process.returncode != 0 or not answer_file.exists():
            lines = log_file.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{module} ended with {process.returncode}: {' | '.join(lines[-3:])}")
        return json.loads(answer_file.read_text())


def job() -> dict[str, Any]:
    """Return the arguments that `fresh` gave to this process."""
    return dict(json.loads(sys.argv[1]))


def answer(arguments: dict[str, Any], value: Any) -> None:
    """Give a value back to `fresh`."""
    Path(arguments["answer"]).write_text(json.dumps(value))


def _wait(process: subprocess.Popen[bytes], deadline: float, watch: Callable[[int], None] | None, late: str) -> None:
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(late)
        if watch is not None:
            watch(process.pid)
        time.sleep(0.1)  # watching costs the watched process time, too


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what still runs: the process is asked first, so that a launcher ends its workers, then its session killed."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
