"""Can this machine run the job? A line for each check; exit code 1 where any has failed, so that another one is taken.

python check_environment.py --run s3://bucket/runs/digits --local /ckpt --ranks 2 --gpus 0 --room-mib 256
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

Check = Callable[[], str]
LEAST_PYTHON, LEAST_TORCH = (3, 11), "2.9"


def python() -> str:
    if sys.version_info < LEAST_PYTHON:
        raise RuntimeError(f"{sys.version.split()[0]} is here, {LEAST_PYTHON} or newer is needed")
    return sys.version.split()[0]


def torch() -> str:
    import torch

    if torch.__version__ < LEAST_TORCH:
        raise RuntimeError(f"{torch.__version__} is here, {LEAST_TORCH} or newer is needed")
    return str(torch.__version__)


def ckptengine() -> str:
    import ckptengine

    return f"{importlib.metadata.version('ckptengine')} in {Path(ckptengine.__file__).parent}"


def ranks(count: int, gpus: int) -> str:
    """Return what the ranks of this machine have: an accelerator each where any are asked for, else a core."""
    import torch

    found, what = torch.accelerator.device_count(), "accelerators"
    if gpus == 0:
        found, what = len(os.sched_getaffinity(0)), "cores"
    wanted = gpus or count
    if found < wanted:
        raise RuntimeError(f"of {what} {found} are here, {wanted} are needed for {count} ranks")
    return f"{found} {what} for {count} ranks"


def disk(folder: Path, room: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    probe, data = folder / f"environment-check-{uuid.uuid4().hex}", os.urandom(1 << 20)
    try:
        probe.write_bytes(data)
        if probe.read_bytes() != data:
            raise RuntimeError(f"{folder} does not give back what was written")
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < room:
        raise RuntimeError(f"{folder} has {free >> 20:,} MiB free, {room >> 20:,} are needed")
    return f"{folder} is writable, {free >> 20:,} MiB free"


def bucket(run: str) -> str:
    import fsspec

    system, root = fsspec.url_to_fs(run)
    name, data = f"{root}/environment-check-{uuid.uuid4().hex}", b"this object is about to be deleted"
    system.pipe_file(name, data)
    try:
        if system.cat_file(name) != data:
            raise RuntimeError(f"{run} does not give back what was written")
    finally:
        system.rm_file(name)
    return f"{run} is reached, written and read"


def checks(args: argparse.Namespace) -> Iterator[tuple[str, Check]]:
    yield "python", python
    yield "torch", torch
    yield "ckptengine", ckptengine
    yield "ranks", lambda: ranks(args.ranks, args.gpus)
    yield "disk", lambda: disk(args.local, args.room_mib << 20)
    yield "bucket", lambda: bucket(args.run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="where the checkpoints go, as a URL")
    parser.add_argument("--local", type=Path, required=True, help="directory on this machine's disk")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--gpus", type=int, default=0, help="accelerators that they need; 0: a core for each rank")
    parser.add_argument("--room-mib", type=int, default=256, help="MiB that must be free on the disk")
    parser.add_argument("--timeout", type=int, default=60, help="longest duration of one check, in seconds")
    args = parser.parse_args()

    def too_late(*_: object) -> None:
        raise TimeoutError(f"no answer in {args.timeout} s")

    signal.signal(signal.SIGALRM, too_late)
    failed = 0
    for name, check in checks(args):
        signal.alarm(args.timeout)
        try:
            print(f"ok      {name:<10}  {check()}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {name:<10}  {type(error).__name__}: {error}", flush=True)
        finally:
            signal.alarm(0)
    print(f"this machine is NOT fit: {failed} of the checks failed" if failed else "this machine is fit", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
