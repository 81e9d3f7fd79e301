"""Directories as Hugging Face writes them: one file of weights, or shards with an index, safetensors or torch.save.

Sources: transformers/modeling_utils.py and huggingface_hub/serialization (the index), and
torch/distributed/checkpoint/hf_storage.py (shards of a distributed save: each tensor's part of each rank in a file).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.foreign.description import Description, ForeignFile, ForeignLeaf, Piece, describe_leaves
from ckptengine.foreign.safetensors import FORMAT, Header, container_of, entry_leaf, read_header
from ckptengine.foreign.torch_zip import READS
from ckptengine.schema.box import Box
from ckptengine.schema.path import Path, dotted
from ckptengine.storage.base import StorageView, check_name
from ckptengine.storage.parallel import in_parallel

__all__ = ["INDEX_SUFFIX", "describe_index", "describe_shards", "is_distributed", "read_weight_map"]

INDEX_SUFFIX = ".index.json"
_MAX_INDEX_NBYTES = 256 << 20
_SHARDING = "DCP_SHARDING_INFO"  # torch/distributed/checkpoint/_hf_utils.py, CUSTOM_METADATA_KEY
_T = TypeVar("_T")


def read_weight_map(storage: StorageView, name: str) -> dict[str, str]:
    """Return the file of each tensor by an index; raises `CheckpointDamagedError` where it is none."""
    where = storage.location(name)
    try:
        document = json.loads(storage.read_bytes(name, _MAX_INDEX_NBYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: no JSON: {error}") from None
    weights = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not weights or not all(type(file) is str for file in weights.values()):
        raise CheckpointDamagedError(f"{where}: an index must have a weight_map, from tensors to files")
    for file in set(weights.values()):
        try:
            check_name(file)
        except StorageError:
            raise CheckpointDamagedError(f"{where}: {file!r:.120} is no file beside the index") from None
    return weights


def describe_index(
    storage: StorageView, name: str, describe_file: Callable[[StorageView, str], Description]
) -> Description:
    """Return what the files of an index hold together.

    `describe_file` describes one that is not safetensors. Raises `CheckpointDamagedError` naming the index, and the
    file that is missing, the tensor that its file lacks, or a name that two files have and the index does not settle.
    """
    where = storage.location(name)
    weights = read_weight_map(storage, name)
    files = sorted(set(weights.values()))
    for file in files:
        if storage.size(file) is None:
            lost = sum(one == file for one in weights.values())
            raise CheckpointDamagedError(
                f"{where}: names {file}, which is missing, for {lost} of {len(weights)} tensors: fetch it too"
            )
    if all(file.endswith(".safetensors") for file in files):
        headers = dict(zip(files, _each(files, lambda file: read_header(storage, file)), strict=True))
        _check_weights(weights, {file: header.entries for file, header in headers.items()}, where)
        numbers = {file: number for number, file in enumerate(files)}
        leaves = [
            entry_leaf(key, entry, numbers[file])
            for file, header in headers.items()
            for key, entry in header.entries.items()
            if weights.get(key, file) == file
        ]
        sizes = tuple(ForeignFile(file, headers[file].nbytes) for file in files)
        table, _, _ = describe_leaves(leaves, sizes, container_of(headers.values()), where)
        metadata = next((header.metadata for header in headers.values()), {})
        return Description(f"{FORMAT} in shards", sizes, table, flat=True, metadata=metadata)
    described = dict(zip(files, _each(files, lambda file: describe_file(storage, file)), strict=True))
    return _joined(described, weights, where)


def _each(files: Sequence[str], look: Callable[[str], _T]) -> list[_T]:
    found: dict[str, _T] = {}

    def add(file: str) -> None:
        found[file] = look(file)

    in_parallel(add, files, READS)
    return [found[file] for file in files]


def _check_weights(weights: Mapping[str, str], held: Mapping[str, Mapping[str, Any]], where: str) -> None:
    for key, file in weights.items():
        if key not in held[file]:
            raise CheckpointDamagedError(
                f"{where}: says that {key!r:.120} is in {file}, which has no tensor of that name"
            )
    seen: dict[str, str] = {}
    for file, names in held.items():
        for key in names:
            if key not in weights and seen.setdefault(key, file) != file:
                raise CheckpointDamagedError(
                    f"{where}: {key!r:.120} is in {seen[key]} and in {file}, and the index does not say which is meant"
                )


def _joined(described: Mapping[str, Description], weights: Mapping[str, str], where: str) -> Description:
    """Return one description of shards that torch.save wrote, each a dict of tensors by their names.

    What two shards have is taken from that which the index says.
    """
    files = [replace(one.files[0]) for one in described.values()]
    leaves: list[ForeignLeaf] = []
    aliases: dict[Path, Path] = {}
    values: dict[Path, Any] = {}
    unread: dict[Path, str] = {}
    held: dict[str, dict[str, None]] = {}
    for number, (name, one) in enumerate(described.items()):
        table = one.table
        tied: dict[Path, list[str]] = {leaf.path: [dotted(leaf.path)] for leaf in table.leaves}
        for path, first in one.aliases.items():
            tied[first].append(dotted(path))
        tensors = [key for keys in tied.values() for key in keys]
        listed = (key for key in map(dotted, one.unread) if key in weights)
        held[name] = dict.fromkeys([*tensors, *map(dotted, one.values), *listed])
        for place, leaf in enumerate(table.leaves):
            keys = [key for key in tied[leaf.path] if weights.get(key, name) == name]
            if not keys:
                continue
            offsets, lengths = table.boxes(place)
            rows = range(*leaf.rows)
            pieces = tuple(
                Piece(Box(tuple(o), tuple(n)), number, int(table.position[row]), 0, one.orders.get(row))
                for row, o, n in zip(rows, offsets.tolist(), lengths.tolist(), strict=True)
            )
            leaves.append(ForeignLeaf((keys[0],), leaf.dtype, leaf.shape, pieces))
            aliases |= {(key,): (keys[0],) for key in keys[1:]}
        values |= {(dotted(p),): value for p, value in one.values.items() if weights.get(dotted(p), name) == name}
        unread |= {(dotted(p),): what for p, what in one.unread.items() if weights.get(dotted(p), name) == name}
    _check_weights(weights, held, where)
    table, _, orders = describe_leaves(leaves, files, "torch", where)
    kind = "torch.save in shards"
    return Description(kind, tuple(files), table, None, orders, values, aliases, flat=True, unread=unread)


def is_distributed(header: Header) -> bool:
    """Whether a file is one of those that each rank of a distributed save wrote."""
    return _SHARDING in header.metadata


def describe_shards(storage: StorageView, names: Sequence[str]) -> Description:
    """Return what the files hold together that each rank of `HuggingFaceStorageWriter(save_distributed=True)` wrote.

    Raises `CheckpointDamagedError` where a file does not tell which parts it has.
    """
    headers = _each(names, lambda name: read_header(storage, name))
    pieces: dict[str, list[Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for number, (name, header) in enumerate(zip(names, headers, strict=True)):
        where = storage.location(name)
        try:
            offsets = {
                key: tuple(one["saved_offsets"]) for key, one in json.loads(header.metadata.get(_SHARDING, "")).items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise CheckpointDamagedError(f"{where}: does not say which parts of the tensors it has") from None
        for key, entry in header.entries.items():
            offset = offsets.get(key)
            good = offset is not None and all(type(n) is int and n >= 0 for n in offset)
            if offset is None or not good or len(offset) != len(entry.shape):
                raise CheckpointDamagedError(f"{where}: does not say which part of {key!r:.120} it has")
            if dtypes.setdefault(key, entry.dtype) != entry.dtype:
                raise CheckpointDamagedError(f"{where}: {key!r:.120} is {entry.dtype} here, {dtypes[key]} elsewhere")
            ends = tuple(o + n for o, n in zip(offset, entry.shape, strict=True))
            known = shapes.get(key, ends)
            if len(known) != len(ends):
                raise CheckpointDamagedError(f"{where}: {key!r:.120} has {len(ends)} dimensions here, others elsewhere")
            shapes[key] = tuple(map(max, known, ends))
            if 0 not in entry.shape:
                pieces.setdefault(key, []).append(Piece(Box(offset, entry.shape), number, entry.begin))
    leaves = [ForeignLeaf((key,), dtypes[key], shapes[key], tuple(pieces.get(key, ()))) for key in shapes]
    files = tuple(ForeignFile(name, header.nbytes) for name, header in zip(names, headers, strict=True))
    table, _, _ = describe_leaves(leaves, files, "torch", storage.location())
    return Description(f"{FORMAT} of a distributed save", files, table, flat=True)
