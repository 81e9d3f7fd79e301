"""How a job ends like a machine that fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["die"]


def die(options: Mapping[str, Any]) -> None:
    """Kill this process, once a checkpoint is committed and all ranks are here; `killed` is touched before.

    `run` is where step `committed`, a pattern, is waited for.
    """
    deadline = time.monotonic() + 60
    while not list(Path(options["run"]).glob(f"step-*{options['committed']}/manifest-*.json")):
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(0.02)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    Path(options["killed"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)
