"""Nodes of a torchrun job, all on this machine. A node is one agent and the ranks that it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

__all__ = ["Node", "free_port"]

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    # torch 2.13 keeps one store over all lives of a job whose first agent lives on. There gloo finds the addresses
    # of the dead ranks, and an agent that joins late waits for a master address that is never announced again.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


class Node:
    """One torchrun agent of an elastic job of one to two nodes with two ranks each.

    The agent with `host=True` serves the rendezvous of the job: that one has to outlive the other.
    """

    def __init__(self, name: str, port: int, log: Path, command: list[str], *, host: bool) -> None:
        self.name = name
        self.log = log
        rendezvous = f"join_timeout=60,last_call_timeout=3,is_host={int(host)}"
        with log.open("wb") as output:
            self._agent = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run"),
                    *("--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=3", "--local-addr=127.0.0.1"),
                    *("--rdzv-backend=c10d", f"--rdzv-conf={rendezvous}"),
                    *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=demo"),
                    *command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """The agent's exit code, negative for a signal, None while it runs."""
        return self._agent.poll()

    def kill(self) -> list[int]:
        """Send SIGKILL to the agent and to its ranks; return their process ids once all are dead.

        The ranks are in sessions of their own (torchrun's doing), so they are found by parentage.
        """
        if self.exit_code is not None:
            return []
        victims = [self._agent.pid, *_descendants(self._agent.pid)]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._agent.wait(30)
        deadline = time.monotonic() + 30
        while any(_alive(pid) for pid in victims):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: of {victims}, some live on after SIGKILL")
            time.sleep(0.02)
        return victims


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stat(pid: int) -> tuple[str, int] | None:
    """Return a process's state letter and parent (Linux's /proc/PID/stat), None for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def _alive(pid: int) -> bool:
    stat = _stat(pid)
    return stat is not None and stat[0] not in "ZX"


def _descendants(pid: int) -> list[int]:
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            children[stat[1]].append(int(entry.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        todo += (below := children[todo.pop()])
        found += below
    return found
