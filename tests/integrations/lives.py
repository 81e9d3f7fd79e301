"""Jobs as processes that get killed and are started again: forked from this one, which has imported the trainer."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ports import free_port

KILLED = -signal.SIGKILL


def lives(jobs: Sequence[Callable[[], object]], log: Path) -> list[int]:
    """Run jobs beside each other, as the ranks of one (gloo), and return their exit codes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = place | {"WORLD_SIZE": str(len(jobs)), "OMP_NUM_THREADS": "1"}
    started = [begun(job, log, ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank, job in enumerate(jobs)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]


def life(job: Callable[[], object], log: Path) -> int:
    """Run a job in a process of its own and return its exit code (negative: the signal that ended it)."""
    return os.waitstatus_to_exitcode(os.waitpid(begun(job, log, {}), 0)[1])


def begun(job: Callable[[], object], log: Path, environment: Mapping[str, str]) -> int:
    """Begin a job in a process of its own and return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= environment
        sys.stdout = sys.stderr = file = log.open("a", buffering=1)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        job()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
