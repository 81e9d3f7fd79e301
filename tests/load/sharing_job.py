"""One rank of a small job without a framework: `sharing_job.py FOLDER RANK SIZE ATTEMPT LAYOUT SCENARIO`.

It loads `FOLDER/run` into its part of the state and writes what it found to `FOLDER/ATTEMPT-RANK.json`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import ckptengine as ce
from ckptengine.archive.reader import Archive
from ckptengine.comm.exchange import StoreCommunicator
from ckptengine.load import loader, node, share, window
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.open import open_storage

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from file_store import FileStore

TIMEOUT = 4.0
SHAPE = (1024, 4096)
LEAVES = 4


def whole(leaf: int) -> np.ndarray:
    return np.random.default_rng(leaf).integers(0, 2**32, SHAPE, np.uint32)


def cut(layout: str, rank: int, size: int) -> tuple[slice, slice]:
    """Return a rank's box: rows or columns in ceil-division as FSDP cuts them, or everything."""
    length = SHAPE[1 if layout == "columns" else 0]
    part = -(-length // size)
    mine = slice(min(rank * part, length), min((rank + 1) * part, length))
    everything = slice(0, None)
    return {"rows": (mine, everything), "columns": (everything, mine), "replicas": (everything, everything)}[layout]


def state_of(layout: str, rank: int, size: int, filled: bool) -> dict[str, Any]:
    """Return a rank's part of the state: each leaf by one layout, and a few small ones that all ranks have."""
    box = cut(layout, rank, size)
    state: dict[str, Any] = {f"bias-{leaf}": np.full(1000, leaf * filled, np.int16) for leaf in range(LEAVES)}
    for leaf in range(LEAVES):
        local = np.ascontiguousarray(whole(leaf)[box])
        if not filled:
            local.fill(1)
        offset = tuple(part.start for part in box)
        state[f"w-{leaf}"] = local if layout == "replicas" else ce.ShardedArray(local, SHAPE, offset)
    return state


def arrays(state: dict[str, Any]) -> list[np.ndarray]:
    return [value.local if isinstance(value, ce.ShardedArray) else value for value in state.values()]


def field(name: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def die_while_reading(call: int, number: int) -> None:
    """Have this process get a signal in the middle of its n-th read of a shared request."""
    read, calls = Archive.read_into, []

    def read_into(self: Archive, position: int, address: int, nbytes: int) -> None:
        calls.append(position)
        if len(calls) == call:
            read(self, position, address, min(nbytes, 65536))
            os.kill(os.getpid(), number)
            time.sleep(60)
        read(self, position, address, nbytes)

    Archive.read_into = read_into  # type: ignore[method-assign]


def stall_while_reading(call: int) -> None:
    """Have the storage never answer this process's n-th read of a shared request."""
    load, calls = LocalStorage.load_archive, []

    def load_archive(self: LocalStorage, name: str, *arguments: Any) -> int:
        if threading.current_thread().name == "ckptengine-read":
            calls.append(name)
            if len(calls) == call:
                threading.Event().wait()
        return load(self, name, *arguments)

    LocalStorage.load_archive = load_archive  # type: ignore[assignment,method-assign]


def limit_memory(most: int) -> None:
    """Have windows of more bytes than this fail as where memory is short."""
    allocate = os.posix_fallocate

    def limited(fd: int, position: int, nbytes: int) -> None:
        if nbytes > most:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, position, nbytes)

    os.posix_fallocate = limited


def prepare(scenario: str, rank: int) -> None:
    """Make something special of this rank, or of all."""
    name, _, argument = scenario.partition(":")
    if name == "strangers":
        node.identity = lambda: bytes([rank]) * 16
    elif name == "pairs":
        node.identity = lambda: bytes([rank // 2]) * 16
    elif name == "odd-one":
        node.identity = lambda: bytes([rank == 3]) * 16
    elif name == "memory":
        limit_memory(int(argument))
    elif name in ("kill", "hang") and rank == int(argument):
        die_while_reading(2, signal.SIGKILL if name == "kill" else signal.SIGSTOP)
    elif name == "stall" and rank == int(argument):
        stall_while_reading(2)
    elif name == "two-slots":
        window.MOST_SLOTS = share.MOST_SLOTS = 2


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    attempt, layout, scenario = sys.argv[4], sys.argv[5], sys.argv[6]
    comm = StoreCommunicator(FileStore(folder / "store"), rank, size, attempt)
    if scenario == "save":
        ce.save(folder / "run", state_of(layout, rank, size, True), comm=comm)
        return
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckptengine").addHandler(handler)
    asked: list[int] = []
    load = LocalStorage.load_archive

    def counted(self: LocalStorage, name: str, read: ArchiveRead) -> int:
        if "rank-" in name:
            asked.append(int(read.ranges[:, 1].sum()))  # several threads read; `+=` would lose some
        return load(self, name, read)

    LocalStorage.load_archive = counted  # type: ignore[assignment,method-assign]
    needs: list[list[int]] = []
    plan = loader.plan_filling

    def seen(*arguments: Any) -> Any:
        filling = plan(*arguments)
        needs.extend(filling.needs.tolist())
        return filling

    loader.plan_filling = seen
    state, expected = state_of(layout, rank, size, False), state_of(layout, rank, size, True)
    prepare(scenario, rank)
    comm.barrier(120)  # what they are made of takes each rank its time
    Path("/proc/self/clear_refs").write_text("5")
    before, began = field("VmRSS"), time.monotonic()
    kind = text = ""
    counts: tuple[int, ...] = ()
    try:
        found = loader.load_newest(open_storage(folder / "run"), state, comm, TIMEOUT, loader.LoadOptions()).counts
        counts = (found.read, found.needed, found.node_needed)
    except Exception as error:
        kind, text = type(error).__name__, f"{error} {error.__cause__ or ''}"
    said = {
        "kind": kind,
        "text": text,
        "seconds": time.monotonic() - began,
        "same": all(np.array_equal(a, b) for a, b in zip(arrays(state), arrays(expected), strict=True)),
        "counts": counts,
        "asked": sum(asked),
        "needs": needs,
        "growth": field("VmHWM") - before,
        "files": len(os.listdir("/proc/self/fd")),
        "shared": sorted(name for name in os.listdir("/dev/shm") if "ckptengine-load" in name),
        "mapped": Path("/proc/self/maps").read_text().count("ckptengine-load"),
        "messages": messages,
    }
    (folder / f"{attempt}-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
