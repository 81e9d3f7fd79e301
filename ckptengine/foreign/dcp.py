"""Directories of PyTorch's distributed checkpoint (DCP): a pickled `.metadata`, and files of serialized tensors.

Source: torch/distributed/checkpoint/metadata.py, filesystem.py, planner_helpers.py and _nested_dict.py of torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ckptengine.errors import CheckpointDamagedError, CheckpointError, ForeignFormatError
from ckptengine.foreign.description import Description, ForeignFile, ForeignLeaf, Piece, describe_leaves
from ckptengine.foreign.names import NAMES, PLAIN, VALUES, dtype_name, shape_of, storage_of
from ckptengine.foreign.torch_file import VISITS_PER_BYTE, torch_leaves
from ckptengine.foreign.torch_tree import Tree, tree_of
from ckptengine.foreign.torch_zip import READS, Part, open_torch_zip
from ckptengine.foreign.unpickle import Names, Record, short, unpickle
from ckptengine.schema.box import Box
from ckptengine.schema.path import Path
from ckptengine.state.forms import Form
from ckptengine.state.tree import unflatten
from ckptengine.storage.base import StorageView
from ckptengine.storage.parallel import in_parallel

__all__ = ["METADATA", "SUFFIX", "describe_dcp"]

METADATA = ".metadata"
SUFFIX = ".distcp"
_MAX_METADATA_NBYTES = 2 << 30
_MAX_VALUE_NBYTES = 1 << 30


def _record(kind: str) -> Callable[..., Record]:
    return lambda *arguments: Record(kind, arguments)


_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES: Names = {
    **PLAIN,
    "torch.Size": lambda items=(): shape_of(items),
    **{
        f"{_METADATA}.{name}": _record(name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": _record("_StorageInfo"),
    "torch.distributed.checkpoint.filesystem._StoragePrefix": _record("_StoragePrefix"),
    **{  # of Megatron's `torch_dist`, which keeps the plans in the metadata
        f"torch.distributed.checkpoint.planner.{name}": _record(name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    },
    "torch.serialization._get_layout": _record("layout"),
    **{f"pathlib.{name}": _record("path") for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")},
}


def describe_dcp(storage: StorageView, directory: str = "") -> Description:
    """Return what a DCP directory holds: tensors with all their chunks, and plain values.

    Raises `CheckpointDamagedError` where `.metadata` is missing or contradicts itself, `ForeignFormatError` for types
    that are not read and tensors that were compressed by an extension.
    """
    where = storage.location(METADATA)
    if storage.size(METADATA) is None:
        raise CheckpointDamagedError(
            f"{where}: missing. DCP writes it last, so this save was not finished: take an older checkpoint"
        )
    found = unpickle(storage.read_bytes(METADATA, _MAX_METADATA_NBYTES), _NAMES, where, None, VALUES)
    state = found.state if isinstance(found, Record) and found.kind == "Metadata" else None
    if state is None or not isinstance(state.get("state_dict_metadata"), dict):
        raise CheckpointDamagedError(f"{where}: does not hold the metadata of a checkpoint")
    try:
        return _Reading(storage, where, state).described()
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointDamagedError(f"{where}: {error}") from None


class _Reading:
    """One checkpoint while it is described."""

    def __init__(self, storage: StorageView, where: str, state: Mapping[str, Any]) -> None:
        self._storage, self._where = storage, where
        self._entries: dict[Any, Any] = state["state_dict_metadata"]
        self._paths = _paths(state.get("planner_data"), self._entries)
        self._places = self._storage_places(state.get("storage_data"))
        self._numbers: dict[str, int] = {}
        self._sizes: list[ForeignFile] = []

    def described(self) -> Description:
        """Return the description."""
        leaves: list[ForeignLeaf] = []
        blobs: list[tuple[str, tuple[int, int, int]]] = []
        for name, entry in self._entries.items():
            kind = entry.kind if isinstance(entry, Record) else None
            if type(name) is not str or kind not in ("TensorStorageMetadata", "BytesStorageMetadata"):
                raise CheckpointDamagedError(f"{self._where}: {short(name)} is described as no tensor and no value")
            if kind == "TensorStorageMetadata":
                leaves.append(self._tensor(name, entry.state))
            else:
                blobs.append((name, self._place(name, None)))
        values, aliases, more, containers, unread = self._values(blobs)
        leaves += more
        containers |= self._lists()
        values, containers = _folded(values, containers, {leaf.path for leaf in leaves} | aliases.keys())
        files = tuple(self._sizes)
        table, blob_nbytes, orders = describe_leaves(leaves, files, "torch", self._where)
        flat = self._paths is None
        return Description("DCP", files, table, blob_nbytes, orders, values, aliases, containers, flat, unread=unread)

    def _path(self, name: str) -> Path:
        return (name,) if self._paths is None else self._paths[name]

    def _storage_places(self, stored: Any) -> dict[tuple[str, tuple[int, ...] | None], Record]:
        if not isinstance(stored, dict):
            raise CheckpointDamagedError(f"{self._where}: does not say where the tensors lie")
        places: dict[tuple[str, tuple[int, ...] | None], Record] = {}
        for index, info in stored.items():
            if not isinstance(index, Record) or not isinstance(info, Record) or info.kind != "_StorageInfo":
                raise ForeignFormatError(
                    f"{self._where}: written by a storage writer of its own, not by PyTorch's FileSystemWriter or "
                    "FsspecWriter: read it with that library"
                )
            fqn, offset = index.state.get("fqn"), index.state.get("offset")
            if type(fqn) is not str:
                raise CheckpointDamagedError(f"{self._where}: {short(fqn)} is no name of a tensor")
            places[fqn, None if offset is None else shape_of(offset)] = info
        return places

    def _place(self, name: str, offset: tuple[int, ...] | None) -> tuple[int, int, int]:
        """Return file, first byte and bytes of an item."""
        info = self._places.get((name, offset)) or self._places.get((name, None))
        if info is None:
            raise CheckpointDamagedError(f"{self._where}: does not say where {name} at {offset} lies")
        file, position, nbytes = (info.state.get(key) for key in ("relative_path", "offset", "length"))
        if type(file) is not str or type(position) is not int or type(nbytes) is not int or nbytes < 0:
            raise CheckpointDamagedError(f"{self._where}: the place of {name} is not one in a file")
        if info.state.get("transform_descriptors"):
            through = short(info.state["transform_descriptors"]).strip("[]'")
            raise ForeignFormatError(
                f"{self._where}: {name} went through {through}, which is not read: save it without extensions"
            )
        if file not in self._numbers:
            size = self._storage.size(file)
            if size is None:
                raise CheckpointDamagedError(f"{self._where}: names {file}, which is missing, for {name}")
            self._numbers[file] = len(self._sizes)
            self._sizes.append(ForeignFile(file, size))
        return self._numbers[file], position, nbytes

    def _tensor(self, name: str, state: Mapping[str, Any]) -> ForeignLeaf:
        properties = state.get("properties")
        raw = properties.raw if isinstance(properties, Record) else None
        chunks = state.get("chunks")
        if not isinstance(raw, tuple) or not raw or not isinstance(chunks, list):
            raise CheckpointDamagedError(f"{self._where}: {name} has no dtype, or no chunks")
        shape = shape_of(state.get("size"))
        pieces = []
        for chunk in chunks:
            inner = chunk.state if isinstance(chunk, Record) else {}
            offset, size = shape_of(inner.get("offsets")), shape_of(inner.get("sizes"))
            if math.prod(size):
                file, position, nbytes = self._place(name, offset)
                pieces.append(Piece(Box(offset, size), file, position, nbytes))
        return ForeignLeaf(self._path(name), dtype_name(raw[0]), shape, tuple(pieces))

    def _values(
        self, blobs: list[tuple[str, tuple[int, int, int]]]
    ) -> tuple[dict[Path, Any], dict[Path, Path], list[ForeignLeaf], dict[Path, Form], dict[Path, str]]:
        """Return the plain values, the tensors that lie in values, such as those of a list, and what is neither."""
        found: dict[str, tuple[Tree, list[ForeignLeaf], dict[Path, Path]]] = {}

        def look(item: tuple[str, tuple[int, int, int]]) -> None:
            name, (file, position, nbytes) = item
            path = self._sizes[file].name
            where = f"{self._storage.location(path)}, {name} at byte {position}"
            if not 0 <= position <= self._sizes[file].nbytes - nbytes or nbytes > _MAX_VALUE_NBYTES:
                raise CheckpointDamagedError(f"{where}: its {nbytes:,} bytes do not lie in the file: it is cut off")
            archive = open_torch_zip(Part(self._storage, path, position, nbytes), where)
            tree = Tree()
            value = unpickle(archive.pickle, NAMES, where, storage_of, VALUES, unread=True)
            tree_of(value, tree, self._path(name), (1 << 16) + VISITS_PER_BYTE * len(archive.pickle), where)
            found[name] = (tree, *torch_leaves(tree, archive, file, position, where))

        in_parallel(look, blobs, READS)
        values: dict[Path, Any] = {}
        aliases: dict[Path, Path] = {}
        leaves: list[ForeignLeaf] = []
        containers: dict[Path, Form] = {}
        unread: dict[Path, str] = {}
        for name, _ in blobs:
            tree, more, same = found[name]
            values |= tree.values
            unread |= tree.unread
            containers |= tree.containers
            aliases |= same
            leaves += more
        return values, aliases, leaves, containers, unread

    def _lists(self) -> dict[Path, Form]:
        """Return the lists of the state: DCP makes one of what has integers for keys (`_nested_dict.set_element`)."""
        paths = () if self._paths is None else self._paths.values()
        return {path[:depth]: "list" for path in paths for depth in range(1, len(path)) if type(path[depth]) is int}


def _folded(
    values: dict[Path, Any], containers: dict[Path, Form], tensors: Collection[Path]
) -> tuple[dict[Path, Any], dict[Path, Form]]:
    """Return values in which a list without tensors is one value again, as the walk over a state has it."""
    above = {path[:depth] for path in tensors for depth in range(len(path))}
    plain = {path for path in containers if path not in above}
    outermost = {path for path in plain if not any(path[:depth] in plain for depth in range(len(path)))}
    lists: dict[Path, dict[Path, Any]] = {path: {} for path in outermost}
    rest: dict[Path, Any] = {}
    for path, value in values.items():
        inside = next((path[:depth] for depth in range(1, len(path)) if path[:depth] in outermost), None)
        (rest if inside is None else lists[inside])[path] = value
    for path, items in lists.items():
        forms = {where: form for where, form in containers.items() if where[: len(path)] == path}
        built: Any = unflatten(items, {}, forms, {})
        for key in path:
            built = built[key]
        if isinstance(built, list):
            rest[path] = built
            containers = {where: form for where, form in containers.items() if where not in forms}
        else:
            rest |= items
    return rest, containers


def _paths(planner_data: Any, entries: Mapping[Any, Any]) -> dict[str, Path] | None:
    """Return the path of each name, None where the planner has not told them all: the names are text then."""
    if not isinstance(planner_data, dict) or not all(name in planner_data for name in entries):
        return None
    paths: dict[str, Path] = {}
    for name in entries:
        path = planner_data[name]
        if not isinstance(path, tuple) or not path or not all(type(key) in (str, int) for key in path):
            return None
        paths[name] = path
    return paths if len(set(paths.values())) == len(paths) else None
