"""Starts the ranks of a job of PyTorch's as torchrun does, from a process that has imported torch already."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from forkserver import ROOT, TELL_STACKS, Forked, fork

__all__ = ["Job", "run_ranks"]

STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(86400)
"""


@dataclass(frozen=True)
class Done:
    """How a job has ended: 0, or the exit code of the first rank that failed; and what its ranks printed."""

    returncode: int
    stdout: str


class Job:
    """Ranks on this machine, with the store in a process of its own, as torchrun's agent hosts it.

    Where a rank fails, the others are ended, as torchrun does; nothing is started again: what a test wants to know of
    torchrun itself, it has to ask torchrun.
    """

    def __init__(
        self, ranks: int, script: str | os.PathLike[str], *arguments: object, env: Mapping[str, str] | None = None
    ) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self._store = fork(["-c", STORE], stdout=subprocess.PIPE)
        assert self._store.stdout is not None
        with self._store.stdout as said:
            port = said.readline().strip()
        common = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "test",
            **(env or {}),
        }  # fmt: skip
        command = [str(script), *map(str, arguments)]
        self.ranks: list[Forked] = [
            fork(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=self.output,
                 stderr=self.output)
            for rank in range(ranks)
        ]  # fmt: skip

    def wait(self, timeout: float = 280) -> int:
        """Return 0 when all ranks have ended well; else end all, and return the first bad code.

        Where a signal has ended a rank, that is the first: what the others raise follows from it, and may be known
        a moment earlier.
        """
        deadline = time.monotonic() + timeout
        try:
            while True:
                codes = [rank.poll() for rank in self.ranks]
                if any(codes):
                    time.sleep(0.1)
                    return min(code for code in (*codes, *(rank.poll() for rank in self.ranks)) if code)
                if None not in codes:
                    return 0
                if time.monotonic() > deadline:
                    for rank in self.ranks:
                        rank.send_signal(TELL_STACKS)
                    time.sleep(2)
                    raise AssertionError(f"ranks still run after {timeout} s: {codes}\n{self.printed()}")
                time.sleep(0.01)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all ranks at once, and what they have started."""
        for process in (*self.ranks, self._store):
            process.kill()
        for process in (*self.ranks, self._store):
            process.wait(60)

    def printed(self) -> str:
        """Return what the ranks have printed, standard output and errors together."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.output.close()


def run_ranks(
    ranks: int,
    script: str | os.PathLike[str],
    *arguments: object,
    env: Mapping[str, str] | None = None,
    timeout: float = 280,
) -> Done:
    """Run a script on so many ranks to its end."""
    with Job(ranks, Path(script), *arguments, env=env) as job:
        return Done(job.wait(timeout), job.printed())
