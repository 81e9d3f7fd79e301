"""Starts jobs of several real processes, watches what their ranks log, and sends them signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forkserver import fork
from ports import free_port

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a child. Each life of a job has a store of its own, as docs/torchrun.md tells."""
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **ours, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **more}


class Job:
    """Ranks under torchrun's agents or, without `restarts`, as children of this process.

    With several `nodes`, each of an agent and as many ranks, the job goes on where one is lost.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int,
        steps: int,
        *,
        restarts: int | None,
        nodes: int = 1,
        script: str = "preempted_job.py",
        **options: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.ranks = folder, ranks * nodes
        self.run = Path(options.setdefault("run", str(folder / "run")))
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        program = [str(HERE / script), str(folder), str(steps), json.dumps(options)]
        agent = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        agent += [f"--max-restarts={restarts}", "--monitor-interval=0.05"]
        port, local = str(free_port()), {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks)}
        if restarts is None:
            starts = [([], {**local, "MASTER_PORT": port, "RANK": str(rank)}) for rank in range(ranks)]
        elif nodes == 1:
            starts = [([*agent, "--standalone"], {})]
        else:
            agent += [f"--nnodes=1:{nodes}", "--local-addr=127.0.0.1", "--rdzv-backend=c10d"]
            agent += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
            conf = "--rdzv-conf=join_timeout=60,last_call_timeout=3,is_host="
            starts = [([*agent, conf + str(int(node == 0))], {}) for node in range(nodes)]
        with self.output.open("wb") as output:
            self.processes = [
                subprocess.Popen([*command, *program], stdout=output, stderr=output, env=environment(**more))
                if command
                else fork(program, stdout=output, stderr=output, env=environment(**more))
                for command, more in starts
            ]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in {entry["pid"] for rank in range(self.ranks) for entry in self.log(rank)}:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if str(self.folder).encode() in command:
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def log(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"rank-{rank}.log"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def told(self, key: str, life: int = 0) -> list[Any]:
        """Return what each rank said last under a key in a life; None for one that hasn't."""
        return [
            next((entry[key] for entry in reversed(self.log(rank)) if key in entry and entry["life"] == life), None)
            for rank in range(self.ranks)
        ]

    def pid(self, rank: int) -> int:
        return self.log(rank)[-1]["pid"]

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s\n{self.printed()}"
            time.sleep(0.01)

    def codes(self, seconds: float = 90) -> list[int]:
        """Wait until all processes have ended; return their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.printed()}") from None

    def printed(self) -> str:
        text = self.output.read_text(errors="replace")
        return text[:6000] + text[-3000:]


def steps_in(run: Path) -> list[int]:
    """Return the steps that are committed."""
    return [int(path.name[5:]) for path in sorted(run.glob("step-*")) if list(path.glob("manifest-*"))]
