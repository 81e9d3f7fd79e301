"""Bytes per second of one core that the ways into an S3 store move: the engine's, s3fs', obstore's.

`python -m benchmarks.transport --endpoint URL --bucket NAME` against a store (AWS_* hold the credentials), without
`--endpoint` against a server of this file that takes bytes and gives bytes and does nothing else. Needs obstore.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

PART = 8 << 20
FLIGHT = 8


class Sink(BaseHTTPRequestHandler):
    """Takes every body, and answers every range with bytes of one file."""

    protocol_version = "HTTP/1.1"
    nbytes = 0
    file = -1

    def do_PUT(self) -> None:
        left, buffer = int(self.headers.get("Content-Length", 0)), bytearray(1 << 20)
        while left:
            left -= self.rfile.readinto(memoryview(buffer)[: min(left, len(buffer))])
        self.answer(b"", {"ETag": '"1"'})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        root = "InitiateMultipartUpload" if "uploads" in self.path else "CompleteMultipartUpload"
        body = f"<{root}Result><Bucket>b</Bucket><Key>k</Key><UploadId>1</UploadId><ETag>1</ETag></{root}Result>"
        self.answer(body.encode(), {"Content-Type": "application/xml"})

    def do_GET(self) -> None:
        found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, self.nbytes)
        self.send_response_only(206)
        self.tell(stop - start, {"Content-Range": f"bytes {start}-{stop - 1}/{self.nbytes}"})
        while start < stop:
            start += os.sendfile(self.connection.fileno(), self.file, start, stop - start)

    def do_HEAD(self) -> None:
        self.send_response_only(200)
        self.tell(self.nbytes, {})

    def answer(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(200)
        self.tell(len(body), headers)
        self.wfile.write(body)

    def tell(self, nbytes: int, headers: dict[str, str]) -> None:
        common = {"Last-Modified": "Sat, 28 Nov 2026 12:00:00 GMT", "ETag": '"1"', "Content-Length": str(nbytes)}
        for name, value in {**common, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def serve(port: int, nbytes: int) -> None:
    Sink.nbytes, Sink.file = nbytes, os.memfd_create("bytes")
    os.truncate(Sink.file, nbytes)
    ThreadingHTTPServer(("127.0.0.1", port), Sink).serve_forever()


@contextlib.contextmanager
def sink(nbytes: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport", "--serve", str(port), "--mib", str(nbytes >> 20)]
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def ways(endpoint: str, bucket: str, data: np.ndarray) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return for each way what uploads the bytes and what reads them, in ranges of 8 MiB, 8 at a time."""
    import obstore
    import s3fs
    from obstore.store import S3Store

    from ckptengine.storage.parallel import in_parallel
    from ckptengine.storage.remote import RemoteStorage
    from ckptengine.storage.upload import Budget

    ranges = [(start, min(start + PART, data.nbytes)) for start in range(0, data.nbytes, PART)]
    budget = Budget(part_nbytes=PART, requests=FLIGHT)
    storage, alone = (RemoteStorage(f"s3://{bucket}/engine", {"endpoint_url": endpoint}, budget) for _ in range(2))
    alone._objects._ranges = None  # type: ignore[attr-defined]
    fs = s3fs.S3FileSystem(endpoint_url=endpoint, max_concurrency=FLIGHT)
    place = {"endpoint": endpoint, "region": "us-east-1", "virtual_hosted_style_request": False}
    store = S3Store(bucket, **place, client_options={"allow_http": True})

    def engine_up() -> None:
        with storage.create_archive("x", data.nbytes) as archive:
            archive.write(data.ctypes.data, data.nbytes, 0)
            archive.finish()

    def engine_down(through: RemoteStorage = storage) -> None:
        in_parallel(lambda one: through._get("x", one[0], one[1] - one[0]), ranges, FLIGHT)

    def s3fs_up() -> None:
        fs.pipe_file(f"{bucket}/s3fs", memoryview(data).cast("B").tobytes(), chunksize=PART)

    def s3fs_down() -> None:
        for some in range(0, len(ranges), FLIGHT):
            part = ranges[some : some + FLIGHT]
            fs.cat_ranges([f"{bucket}/s3fs"] * len(part), [a for a, _ in part], [b for _, b in part])

    def obstore_up() -> None:
        body = memoryview(data).cast("B")
        obstore.put(store, "obstore", body, use_multipart=True, chunk_size=PART, max_concurrency=FLIGHT)

    def obstore_down() -> None:
        in_parallel(lambda one: obstore.get_range(store, "obstore", start=one[0], end=one[1]), ranges, FLIGHT)

    return {
        "ckptengine": (engine_up, engine_down),
        "ckptengine without obstore": (engine_up, lambda: engine_down(alone)),
        "s3fs": (s3fs_up, s3fs_down),
        "obstore": (obstore_up, obstore_down),
    }


def cost(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes, by the clock and of this process's cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(endpoint: str, bucket: str, nbytes: int, runs: int) -> None:
    data = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    found = ways(endpoint, bucket, data)
    spent: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in range(runs + 1):
        for name, pair in found.items():
            for what, call in zip(("upload", "read"), pair, strict=True):
                taken = cost(call)
                if run:
                    spent.setdefault((name, what), []).append(taken)
    print(f"{'':28}{'':8}{'MB/s':>8}{'MB per second of a core':>26}")
    for (name, what), taken in sorted(spent.items(), key=lambda item: item[0][1]):
        wall, cpu = (statistics.median(nbytes / 1e6 / one[index] for one in taken) for index in (0, 1))
        print(f"{name:28}{what:8}{wall:8.0f}{cpu:26.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint")
    parser.add_argument("--bucket", default="bucket")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--serve", type=int)
    arguments = parser.parse_args()
    nbytes = arguments.mib << 20
    if arguments.serve:
        serve(arguments.serve, nbytes)
        return
    with contextlib.ExitStack() as stack:
        endpoint = arguments.endpoint
        if endpoint is None:
            endpoint = stack.enter_context(sink(nbytes))
            os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1")
        measure(endpoint, arguments.bucket, nbytes, arguments.runs)


if __name__ == "__main__":
    main()
