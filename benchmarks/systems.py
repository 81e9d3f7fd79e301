"""What is measured: each system saves the same tensors as a new checkpoint, and loads them into existing ones.

A system has a `name`, says in `syncs` how its bytes become durable, and writes everything below `path`, which does not
exist when `save` is called. `save` returns (stall, durable) in seconds: when training may go on and change its tensors,
and when the bytes and their directory entries are on the disk. Systems that do not sync have it done for them, within
`durable`. Each is used in the best way that was found, and keeps its buffers, processes and plans between saves.
"""

import os
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from benchmarks.disk import sync_directories, sync_tree
from benchmarks.limit import Limit
from benchmarks.state import State

Seconds = tuple[float, float]


class System(Protocol):
    """What all systems offer; `close` gives back memory and processes."""

    name: ClassVar[str]
    syncs: ClassVar[str]
    path: Path

    def save(self, state: State) -> Seconds: ...

    def load(self, state: State) -> None: ...

    def close(self) -> None: ...


class CkptEngine:
    name = "ckptengine"
    syncs = "its own fsyncs, files and directories"

    def __init__(self, folder: Path, state: State) -> None:
        self.path = folder / "ckptengine"
        self.stats: Any = None
        """What the last save reported of itself."""

    def save(self, state: State) -> Seconds:
        import ckptengine as ce

        began = time.perf_counter()
        handle = ce.async_save(self.path, state)
        stall = time.perf_counter() - began
        self.stats = handle.durable.result()
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        import ckptengine as ce

        ce.load(self.path, into=state)

    def close(self) -> None:
        pass


class Synchronous:
    """Systems whose call returns when everything is written but not synced: the whole call stalls."""

    syncs = "fsync of files and directories added"

    def __init__(self, folder: Path, state: State) -> None:
        self.path = folder / type(self).__name__

    def save(self, state: State) -> Seconds:
        began = time.perf_counter()
        self.write(state)
        stall = time.perf_counter() - began
        sync_tree(self.path)
        return stall, time.perf_counter() - began

    def write(self, state: State) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class TorchSave(Synchronous):
    name = "torch.save"

    def write(self, state: State) -> None:
        self.path.mkdir()
        torch.save(state, self.path / "state.pt")

    def load(self, state: State) -> None:
        for name, tensor in torch.load(self.path / "state.pt", weights_only=True, mmap=True).items():
            state[name].copy_(tensor)


class Safetensors(Synchronous):
    name = "safetensors"

    def write(self, state: State) -> None:
        from safetensors.torch import save_file

        self.path.mkdir()
        save_file(state, self.path / "state.safetensors")

    def load(self, state: State) -> None:
        from safetensors import safe_open

        with safe_open(self.path / "state.safetensors", framework="pt") as file:
            for name, tensor in state.items():
                tensor.copy_(file.get_tensor(name))


class Dcp:
    """PyTorch Distributed Checkpoint, in the calling thread."""

    name = "DCP save"
    syncs = "its own fsync of files; of directories added"

    def __init__(self, folder: Path, state: State) -> None:
        self.path = folder / type(self).__name__

    def save(self, state: State) -> Seconds:
        import torch.distributed.checkpoint as dcp

        began = time.perf_counter()
        dcp.save(state, checkpoint_id=self.path)
        stall = time.perf_counter() - began
        sync_directories(self.path)
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(state, checkpoint_id=self.path)

    def close(self) -> None:
        pass


class DcpAsync(Dcp):
    """DCP's `async_save` as it comes: staging tensors are made anew for each save."""

    name = "DCP async"
    _stager: Any = None
    _write_threads = 1

    def begin(self, state: State) -> Any:
        """Start a save and return the future of its end; training may go on."""
        import torch.distributed.checkpoint as dcp

        if self._stager is None:
            return dcp.async_save(state, checkpoint_id=self.path)
        writer = dcp.FileSystemWriter(self.path, thread_count=self._write_threads)
        done = dcp.async_save(state, storage_writer=writer, async_stager=self._stager)
        return done.upload_completion if hasattr(done, "upload_completion") else done

    def save(self, state: State) -> Seconds:
        began = time.perf_counter()
        done = self.begin(state)
        stall = time.perf_counter() - began
        done.result()
        sync_directories(self.path)
        return stall, time.perf_counter() - began


class DcpAsyncCached(DcpAsync):
    """The same with a stager that keeps its tensors, in shared memory, and a writing thread for each core."""

    name = "DCP async, cached stager"

    def __init__(self, folder: Path, state: State) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(folder, state)
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options)
        self._write_threads = cores()

    def close(self) -> None:
        self._stager.close()


class CkptEngineAsDcp(Dcp):
    """This engine through DCP's calls: torch's planner and stager, its own copy, files and commit."""

    name = "ckptengine.dcp"
    syncs = "its own fsync of files and directories"

    def save(self, state: State) -> Seconds:
        import ckptengine.dcp as dcp

        began = time.perf_counter()
        done: Any = dcp.async_save(state, checkpoint_id=self.path)
        stall = time.perf_counter() - began
        (done.upload_completion if hasattr(done, "upload_completion") else done).result()
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        import ckptengine.dcp as dcp

        dcp.load(state, checkpoint_id=self.path)


class TorchCheckpointing:
    """Meta's torch_checkpointing: staged into shared memory that it keeps, written by a process that it keeps.

    Direct I/O is off, since on ext4 and XFS its unaligned writes are refused (EINVAL). Staging is in the call, so
    that `stall` is the whole copy, as for the others. It writes one file for each item of a checkpoint, so the state
    is given as an item for each core, of about equal bytes, and these are written at once.
    """

    name = "torch_checkpointing"
    syncs = "fsync of files and directories added"

    def __init__(self, folder: Path, state: State) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self.path = folder / "torch_checkpointing"
        self._parts = parts(state, cores())
        config = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(
                writer_config=CheckpointWriterConfig(file_write_max_threads=cores()),
                staging_config=CheckpointStagerConfig(use_async_staging=False),
            ),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
        self._manager = config.build()

    def wait_for_process(self) -> None:
        """Wait until its process has started, which takes seconds in the background; a job is seldom that quick."""
        self._manager._saver._checkpoint_process.wait_for_init()

    def prewarm(self, state: State) -> None:
        """Let it allocate and touch its staging memory before the first save."""
        self._manager.prewarm_staging(self._items(state))

    def _items(self, state: State) -> dict[str, State]:
        return {f"part{number}": {name: state[name] for name in names} for number, names in enumerate(self._parts)}

    def begin(self, state: State) -> Any:
        """Start a save and return the future of its end; training may go on."""
        return self._manager.save(str(self.path), self._items(state))

    def save(self, state: State) -> Seconds:
        began = time.perf_counter()
        done = self.begin(state)
        stall = time.perf_counter() - began
        done.result()
        sync_tree(self.path)
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        self._manager.load(str(self.path), into=self._items(state))

    def close(self) -> None:
        self._manager.close()


class TensorStore:
    """One Zarr v3 array for each tensor, uncompressed, all writes in flight at once."""

    name = "TensorStore zarr3"
    syncs = "its own fsync of files; of directories added"

    def __init__(self, folder: Path, state: State) -> None:
        import tensorstore

        self.path = folder / "tensorstore"
        self._context = tensorstore.Context()

    def _spec(self, name: str, tensor: torch.Tensor | None) -> dict[str, Any]:
        spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.path}/{name}/"}}
        if tensor is not None:
            grid = {"name": "regular", "configuration": {"chunk_shape": list(tensor.shape)}}
            codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = list(tensor.shape)
            spec["metadata"] = {"shape": shape, "data_type": dtype, "chunk_grid": grid, "codecs": codecs}
            # Without it a chunk that equals the fill value is not written.
            spec["store_data_equal_to_fill_value"] = True
        return spec

    def save(self, state: State) -> Seconds:
        import tensorstore

        began = time.perf_counter()
        opened = [
            tensorstore.open(self._spec(name, tensor), create=True, context=self._context)
            for name, tensor in state.items()
        ]
        writes = [array.result().write(tensor.numpy()) for array, tensor in zip(opened, state.values(), strict=True)]
        for write in writes:
            write.copy.result()  # from here on the tensors may change
        stall = time.perf_counter() - began
        for write in writes:
            write.result()
        for directory in (self.path, *(self.path / name for name in state)):
            sync_directories(directory)
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        import tensorstore

        opened = [tensorstore.open(self._spec(name, None), open=True, context=self._context) for name in state]
        reads = []
        for array, tensor in zip(opened, state.values(), strict=True):
            # Written straight into the tensor's memory.
            target = tensorstore.array(tensor.numpy(), copy=False)
            reads.append(target.write(array.result()))
        for read in reads:
            read.result()

    def close(self) -> None:
        pass


class ZarrPython(Synchronous):
    """zarr-python 3, one array for each tensor, uncompressed."""

    name = "zarr-python"

    def write(self, state: State) -> None:
        import zarr

        group = zarr.create_group(self.path)
        for name, tensor in state.items():
            array = group.create_array(
                name, shape=tensor.shape, chunks=tensor.shape, dtype=tensor.numpy().dtype, compressors=None
            )
            array[...] = tensor.numpy()

    def load(self, state: State) -> None:
        import zarr

        group = zarr.open_group(self.path, mode="r")
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(group[name][...]))


SYSTEMS: tuple[Any, ...] = (
    Limit,
    CkptEngine,
    CkptEngineAsDcp,
    TorchCheckpointing,
    DcpAsyncCached,
    DcpAsync,
    Dcp,
    TorchSave,
    Safetensors,
    TensorStore,
    ZarrPython,
)
ASYNCHRONOUS: tuple[Any, ...] = (CkptEngine, TorchCheckpointing, DcpAsyncCached, DcpAsync)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def parts(state: State, number: int) -> list[list[str]]:
    """Split the names of a state into this many lists of about equal bytes."""
    result: list[list[str]] = [[] for _ in range(number)]
    sizes = [0] * number
    for name, tensor in sorted(state.items(), key=lambda item: -item[1].nbytes):
        lightest = sizes.index(min(sizes))
        result[lightest].append(name)
        sizes[lightest] += tensor.nbytes
    return result


def use_all_cores() -> None:
    """Let torch copy on all cores, and silence the peers' warnings."""
    torch.set_num_threads(cores())
    warnings.filterwarnings("ignore")
