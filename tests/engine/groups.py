"""Process groups of several sizes, one after the other, in the processes of one job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def process_rank() -> int:
    """Return the number of this process, whatever group it is in."""
    return int(os.environ["RANK"])


@contextmanager
def group(name: str, size: int) -> Iterator[bool]:
    """Form a process group of the first processes; yields whether this one is in it."""
    rank = process_rank()
    if rank >= size:
        yield False
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, None, False, timedelta(seconds=200))
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
    yield True
    dist.barrier()
    dist.destroy_process_group()


def report(folder: Path, problems: Mapping[str, str]) -> None:
    """Write what this process found, for `launch.launch`."""
    (folder / f"rank-{process_rank()}.json").write_text(json.dumps(problems))
