"""Jobs that a signal reaches in the middle of a save's copy: `interrupted_job.py CASE FOLDER [VICTIM]`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import ckptengine as ce
from ckptengine.errors import CheckpointError
from ckptengine.snapshot.snapshotter import Snapshotter

_fill = Snapshotter.fill


def state(step: int) -> dict[str, Any]:
    return {"a": np.arange(400_000.0) + step, "step": step}


def signal_in_the_next_copy(number: int) -> None:
    """Have this process get a real signal while the next snapshot is being copied."""

    def fill(self: Snapshotter, *arguments: Any) -> None:
        Snapshotter.fill = _fill  # type: ignore[method-assign]
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # it has come by now, whichever thread took it
        _fill(self, *arguments)

    Snapshotter.fill = fill  # type: ignore[method-assign]


def end(folder: Path, number: int) -> None:
    """Save once, and let the signal do what it does to the second save."""
    with ce.Checkpointer(folder / "run", every=1, preemption=None) as ckpt:
        ckpt.step(1, state(1))
        ckpt.wait()
        signal_in_the_next_copy(number)
        ckpt.step(2, state(2))


def go_on(folder: Path, victim: int) -> None:
    """Two ranks, one of which gets Ctrl-C in its second save and trains on."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said = {}
    with ce.Checkpointer(folder / "run", every=1, timeout=100, preemption=None) as ckpt:
        for step in (1, 2, 3):
            if step == 2 and rank == victim:
                signal_in_the_next_copy(signal.SIGINT)
            began = time.monotonic()
            try:
                handle = ckpt.step(step, state(step))
                assert handle is not None
                handle.durable.result()
                said[step] = ""
            except (CheckpointError, KeyboardInterrupt) as error:
                said[step] = f"{type(error).__name__}: {error}"
            said[f"seconds {step}"] = str(time.monotonic() - began)
    (folder / f"rank-{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    if case == "ranks":
        go_on(folder, int(sys.argv[3]))
    elif case == "exit":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        end(folder, signal.SIGTERM)
    else:
        end(folder, signal.SIGINT)
