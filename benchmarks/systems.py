"""What is measured: each system saves the same tensors, and loads them into existing ones.

A system's `save` returns (stall, durable) in seconds: when training may go on, and when the bytes are on the disk,
fsync included. Every system keeps its buffers between saves where it can.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import ckptengine as ce
from ckptengine import _native
from ckptengine.snapshot.arena import Arena

State = dict[str, torch.Tensor]


class Limit:
    """memcpy into a warm arena by several threads, then one O_DIRECT file; and back. No checksum, no names."""

    name = "limit: memcpy, O_DIRECT"

    def __init__(self, folder: Path, state: State) -> None:
        self.file = folder / "limit.bin"
        self.arena = Arena()
        self.size = -(-sum(t.nbytes for t in state.values()) // 4096) * 4096
        self.arena.reserve(self.size)
        self.memory = np.frombuffer(self.arena.view(0, self.size), np.uint8)
        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def _places(self, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        position, memory = 0, torch.from_numpy(self.memory)
        for tensor in state.values():
            yield memory[position : position + tensor.nbytes], tensor.view(-1).view(torch.uint8)
            position += tensor.nbytes

    def save(self, state: State) -> tuple[float, float]:
        self.file.unlink(missing_ok=True)  # a checkpoint is a new file each time, with blocks to allocate
        began = time.perf_counter()
        for place, tensor in self._places(state):
            place.copy_(tensor)
        stall = time.perf_counter() - began
        fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(fd, 0, self.size)
        _native.write(fd, self.arena.address, self.size, 0, 8 << 20, 4)
        os.fsync(fd)
        os.close(fd)
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        fd = os.open(self.file, os.O_RDONLY | os.O_DIRECT)
        view, position = self.arena.view(0, self.size), 0
        while position < self.size:
            position += os.preadv(fd, [view[position : position + (16 << 20)]], position)
        os.close(fd)
        for place, tensor in self._places(state):
            tensor.copy_(place)


class CkptEngine:
    name = "ckptengine"

    def __init__(self, folder: Path, state: State) -> None:
        self.path = folder / "ckptengine"

    def save(self, state: State) -> tuple[float, float]:
        began = time.perf_counter()
        handle = ce.async_save(self.path, state)
        stall = time.perf_counter() - began
        handle.durable.result()
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        ce.load(self.path, into=state)


class TorchSave:
    name = "torch.save"

    def __init__(self, folder: Path, state: State) -> None:
        self.file = folder / "torch.pt"

    def save(self, state: State) -> tuple[float, float]:
        began = time.perf_counter()
        with self.file.open("wb") as file:
            torch.save(state, file)
            stall = time.perf_counter() - began
            file.flush()
            os.fsync(file.fileno())
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        for name, tensor in torch.load(self.file, weights_only=True).items():
            state[name].copy_(tensor)


class DcpAsync:
    """DCP's async_save; `cached` keeps its staging tensors, in shared memory, from save to save."""

    cached = False
    name = "DCP async"

    def __init__(self, folder: Path, state: State) -> None:
        self.path = folder / self.name.replace(" ", "-").replace(",", "")
        self.stager = None
        if self.cached:
            options = StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
            self.stager = DefaultStager(options)

    def save(self, state: State) -> tuple[float, float]:
        shutil.rmtree(self.path, ignore_errors=True)
        began = time.perf_counter()
        done = dcp.async_save(state, checkpoint_id=self.path, async_stager=self.stager)
        stall = time.perf_counter() - began
        (done.upload_completion if hasattr(done, "upload_completion") else done).result()
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        dcp.load(state, checkpoint_id=self.path)


class DcpAsyncCached(DcpAsync):
    cached = True
    name = "DCP async, cached stager"


SYSTEMS = (Limit, CkptEngine, TorchSave, DcpAsync, DcpAsyncCached)
