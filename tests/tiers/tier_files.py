"""What lies in a run, and ways to bring it elsewhere, damage it, and fetch it in another process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from buckets import Bucket
from forkserver import Forked, fork
from launch import ROOT, environment

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.listing import Entry, committed, newest, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.storage.base import Storage, join
from ckptengine.storage.local import LocalStorage

RANKS = 4


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a run by name, without the lock of those that fetch."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "prefetch.lock"
    }


def of_step(run: Path, *steps: int) -> dict[str, bytes]:
    """The files of some steps, and the claims."""
    names = tuple(f"step-{step:08d}/" for step in steps)
    return {name: data for name, data in files_of(run).items() if "/" not in name or name.startswith(names)}


def newest_of(storage: Storage) -> tuple[Entry, Manifest]:
    entry = newest(storage)
    assert entry is not None
    return entry, read_manifest(storage, entry)


def archive_of(storage: Storage, rank: int = 0) -> tuple[str, ArchiveRecord]:
    """The name and record of a rank's archive in the newest checkpoint."""
    entry, manifest = newest_of(storage)
    record = manifest.archives[rank]
    return join(attempt_directory(entry.directory, manifest.attempt), record.name), record


def steps_of(folder: Path) -> list[int | None]:
    return [entry.step for entry in committed(LocalStorage(folder))]


def upload(run: Path, bucket: Bucket, path: str = "run") -> None:
    for name, data in files_of(run).items():
        bucket.fs.pipe_file(f"{bucket.url}/{path}/{name}", data)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def start(*arguments: object) -> Forked:
    """Start `ckptengine prefetch` in a process of its own."""
    command = ["-c", "from ckptengine.cli import main; main()", "prefetch", *map(str, arguments)]
    return fork(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def said_so_far(process: Forked) -> bytes:
    """Return what a process has written to its standard error by now, without moving where it writes."""
    assert process.stderr is not None
    return os.pread(process.stderr.fileno(), 1 << 16, 0)


def end(process: Forked) -> tuple[int, str, str]:
    """Wait for a process; return its code and what it said."""
    out, errors = process.communicate(timeout=120)
    return process.wait(), out, errors
