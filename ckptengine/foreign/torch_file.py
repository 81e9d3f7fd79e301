"""A file that `torch.save` wrote: weights, optimizer states and plain values, read by ranges."""

from __future__ import annotations

from typing import Any

from ckptengine.errors import CheckpointDamagedError, ForeignFormatError
from ckptengine.foreign.description import Description, ForeignFile, ForeignLeaf, describe_leaves
from ckptengine.foreign.names import NAMES, VALUES, TensorRef, storage_of
from ckptengine.foreign.torch_tree import Tree, pieces_of, tree_of
from ckptengine.foreign.torch_zip import Part, TorchZip, open_torch_zip
from ckptengine.foreign.unpickle import Unread, refusal, unpickle
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path
from ckptengine.storage.base import StorageView

__all__ = ["VISITS_PER_BYTE", "describe_torch_file", "torch_leaves"]

FORMAT = "torch.save"
VISITS_PER_BYTE = 16
"""Places of the tree that a pickle may have, for each of its bytes: a reference to something takes two."""


def describe_torch_file(storage: StorageView, name: str) -> Description:
    """Return what a file holds that `torch.save` wrote: a dict of tensors, dicts, lists and plain values.

    What is neither is told as unread. Raises `ForeignFormatError` where that is all, and for older formats;
    `CheckpointDamagedError` where the file
    is cut off or contradicts itself.
    """
    where = storage.location(name)
    nbytes = storage.size(name) or 0
    archive = open_torch_zip(Part(storage, name, 0, nbytes), where)
    value = unpickle(archive.pickle, NAMES, where, storage_of, VALUES, unread=True)
    if isinstance(value, Unread):
        raise refusal(where, value.name)
    if not isinstance(value, dict):
        raise ForeignFormatError(
            f"{where}: torch.save was given a {_kind(value)}, not a dict: save a dict with names, {{'tensor': …}}"
        )
    tree = Tree()
    tree_of(value, tree, (), (1 << 16) + VISITS_PER_BYTE * len(archive.pickle), where)
    files = (ForeignFile(name, nbytes),)
    leaves, aliases = torch_leaves(tree, archive, 0, 0, where)
    table, _, orders = describe_leaves(leaves, files, "torch", where)
    unread = tree.unread
    return Description(FORMAT, files, table, None, orders, tree.values, aliases, tree.containers, unread=unread)


def torch_leaves(
    tree: Tree, archive: TorchZip, file: int, start: int, where: str
) -> tuple[list[ForeignLeaf], dict[Path, Path]]:
    """Return the tensors of a tree, whose ZIP starts at a byte of a file, and which of them are others again."""
    positions = archive.positions([_key(ref, archive, where) for ref in tree.tensors.values()])
    leaves: list[ForeignLeaf] = []
    aliases: dict[Path, Path] = {}
    first: dict[Any, Path] = {}
    for path, ref in tree.tensors.items():
        # The very same view of a storage twice is one tensor under two names: tied weights.
        known = first.setdefault((ref.storage.key, ref.dtype, ref.offset, ref.size, ref.stride), path)
        if known != path and ref.size:
            aliases[path] = known
            continue
        pieces = pieces_of(ref, file, start + positions[ref.storage.key], path, where)
        leaves.append(ForeignLeaf(path, ref.dtype, ref.size, pieces))
    return leaves, aliases


def _key(ref: TensorRef, archive: TorchZip, where: str) -> str:
    storage = ref.storage
    nbytes = storage.count * (1 if storage.dtype is None else DTYPES[storage.dtype].itemsize)
    if storage.key not in archive.storages or archive.storages[storage.key][1] < nbytes:
        raise CheckpointDamagedError(f"{where}: the storage {storage.key} is missing, or shorter than {nbytes} bytes")
    return storage.key


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, TensorRef) else type(value).__name__
