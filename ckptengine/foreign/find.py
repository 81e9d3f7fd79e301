"""Which format lies in a place, and what it holds."""

from __future__ import annotations

from ckptengine.errors import CheckpointDamagedError, ForeignFormatError
from ckptengine.foreign.checkpoint import ForeignCheckpoint
from ckptengine.foreign.dcp import METADATA, SUFFIX, describe_dcp
from ckptengine.foreign.description import Description
from ckptengine.foreign.huggingface import INDEX_SUFFIX, describe_index, describe_shards, is_distributed
from ckptengine.foreign.safetensors import describe_safetensors, read_header
from ckptengine.foreign.torch_file import describe_torch_file
from ckptengine.storage.base import StorageView

__all__ = ["describe_foreign", "open_foreign"]

_SINGLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
"""Names of the one file of weights in a directory of Hugging Face, the preferred first."""
_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def open_foreign(storage: StorageView) -> ForeignCheckpoint | None:
    """Return the checkpoint of another library that lies in a place, None where none is known.

    The place is a directory, or a file. Raises what describing it does.
    """
    found = describe_foreign(storage)
    if found is None:
        return None
    description, is_file = found
    return at_place(storage, description, is_file)


def at_place(storage: StorageView, description: Description, is_file: bool) -> ForeignCheckpoint:
    """Return a checkpoint that was described, perhaps by another rank, for this rank to read."""
    beside = storage.beside() if is_file else None
    return ForeignCheckpoint(storage if beside is None else beside[0], description, storage.location())


def describe_foreign(storage: StorageView) -> tuple[Description, bool] | None:
    """Return what another library has left in a place, and whether the place is a file; None where nothing is known."""
    beside = storage.beside()
    if beside is not None and beside[0].size(beside[1]) is not None:
        described = _file(*beside)
        return None if described is None else (described, True)
    described = _directory(storage)
    return None if described is None else (described, False)


def _file(storage: StorageView, name: str) -> Description | None:
    """Return what a file holds, by how it begins."""
    if name.endswith(INDEX_SUFFIX):
        return describe_index(storage, name, describe_torch_file)
    size = storage.size(name) or 0
    start = storage.read_range(name, 0, min(size, 16))
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and name.endswith(_TORCH)):
        return describe_torch_file(storage, name)
    if start[8:9] == b"{" or name.endswith(".safetensors"):
        return describe_safetensors(storage, name)
    if name.endswith(_TORCH):
        return describe_torch_file(storage, name)
    return None


def _directory(storage: StorageView) -> Description | None:
    names = storage.list()
    if METADATA in names or any(name.endswith(SUFFIX) for name in names):
        return describe_dcp(storage)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    preferred = [name for name in indexes if name.endswith(f".safetensors{INDEX_SUFFIX}")] or indexes
    if len(preferred) > 1:
        raise ForeignFormatError(
            f"{storage.location()}: has {len(preferred)} indexes ({', '.join(preferred[:8])}): name the one to read"
        )
    if preferred:
        return describe_index(storage, preferred[0], describe_torch_file)
    for name in _SINGLE:
        if name in names:
            describe = describe_safetensors if name.endswith("safetensors") else describe_torch_file
            return describe(storage, name)
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        return None
    if is_distributed(read_header(storage, weights[0])):
        return describe_shards(storage, weights)
    if len(weights) > 1:
        raise CheckpointDamagedError(
            f"{storage.location()}: has {len(weights)} safetensors files and no index ({', '.join(weights[:4])} …): "
            "fetch model.safetensors.index.json too, or name one of the files"
        )
    return describe_safetensors(storage, weights[0])
