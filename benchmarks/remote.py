"""`remote`: a checkpoint's way into an object store, beside s3fs' own upload and DCP through fsspec, on one S3 server.

    python -m benchmarks.remote [--runs N] [--scale S]

The server is moto's, in a process of its own on this machine: it is slow, and takes its share of the cores, so only
ratios within one round count. Each system uploads the same bytes: ckptengine a state, from the call to the commit; s3fs
one file of that size from the page cache (`put_file`, as it is, and with parts of 16 MiB as ours are, in parallel); DCP
the same state. Needs `moto[server]` and `s3fs`.
"""

import argparse
import statistics
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.rounds import interleaved, median_ratio, spread
from benchmarks.state import gpt2_small, nbytes
from benchmarks.table import Target, show_table, show_targets

OURS, PUT, TUNED, DCP = "ckptengine", "s3fs put_file", "s3fs put_file, parts of 16 MiB", "DCP through fsspec"
OPTIONS = {"key": "key", "secret": "secret", "client_kwargs": {"region_name": "us-east-1"}}


@contextmanager
def server():
    """Run moto's server; yield its URL."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument("--scale", type=float, default=0.25, help="of the state's width (default 0.25)")
    given = parser.parse_args()
    with server() as url, TemporaryDirectory(dir=Path.cwd()) as folder:
        measure(url, Path(folder), given.runs, given.scale)
    return 0


def measure(url: str, folder: Path, runs: int, scale: float) -> None:
    """Upload with each system in turn, and print seconds and ratios."""
    import s3fs
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    import ckptengine as ce

    options = {**OPTIONS, "endpoint_url": url}
    fs = s3fs.S3FileSystem(**options)
    fs.call_s3("create_bucket", Bucket="bench")
    state = gpt2_small(scale)
    total = nbytes(state)
    file = folder / "file"
    file.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in state.values()))

    def timed(call: Callable[[str], object]) -> Callable[[], float]:
        def once() -> float:
            place = f"bench/{uuid.uuid4().hex}"
            began = time.perf_counter()
            call(place)
            seconds = time.perf_counter() - began
            # The server holds all in memory.
            fs.invalidate_cache()
            fs.rm(place, recursive=True)
            return seconds

        return once

    subjects = {
        OURS: timed(lambda place: ce.save(f"s3://{place}", state, storage_options=options)),
        PUT: timed(lambda place: fs.put_file(str(file), f"{place}/file")),
        TUNED: timed(lambda place: fs.put_file(str(file), f"{place}/file", chunksize=16 << 20)),
        DCP: timed(lambda place: dcp.save(state, storage_writer=FsspecWriter(f"s3://{place}", **options))),
    }
    rounds, errors = interleaved(subjects, runs)
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows = [
        (name, spread(seconds).text(), f"{total / statistics.median(seconds) / 1e6:.0f}")
        for name, seconds in rounds.items()
        if seconds
    ]
    show_table(console, f"{total / 1e6:.0f} MB into moto's S3 server", ("system", "seconds", "MB/s"), rows)
    for name, error in errors.items():
        console.print(f"{name}: {error}")
    targets = [
        Target(
            f"throughput, of {name}'s",
            median_ratio(rounds[name], rounds[OURS]) if rounds[OURS] and rounds[name] else None,
            bound,
            at_most=False,
        )
        for name, bound in ((PUT, 1.2), (DCP, 2.0))
    ]
    show_targets(console, targets)


if __name__ == "__main__":
    sys.exit(main())
