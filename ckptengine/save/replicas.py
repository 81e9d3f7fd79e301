"""Whether the arrays that the ranks hold as replicas of each other have the same contents."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np

import ckptengine._native as _native
from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.errors import ReplicaMismatchError, SaveFailedError
from ckptengine.native.tables import CopyPlan, copy_row
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part, Placement
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.ranks import name_ranks
from ckptengine.snapshot.threads import copy_threads
from ckptengine.state.own_state import GROUPS

__all__ = [
    "Crcs",
    "ReplicaCheck",
    "box_crcs",
    "box_path",
    "compare_replicas",
    "decode_crcs",
    "encode_crcs",
    "replica_check",
    "replica_crcs",
    "whole_crcs",
    "with_aliases",
]

Crcs = tuple[tuple[Path, int], ...]
"""Path and CRC32 of each replicated array that a rank holds."""

_PATHS_NBYTES = struct.Struct("<Q")
_NAMED = 4


class ReplicaCheck(Enum):
    """When the contents of replicated arrays are compared."""

    FIRST = "first"
    """At the first save of each plan: when the structure of the state is new."""
    ALWAYS = "always"
    NEVER = "never"


def replica_check(value: str | bool) -> ReplicaCheck:
    """Return what a caller's `check_replicas` stands for; raises `ValueError` naming the choices."""
    if isinstance(value, bool):
        return ReplicaCheck.ALWAYS if value else ReplicaCheck.NEVER
    try:
        return ReplicaCheck(value)
    except ValueError:
        raise ValueError(f"check_replicas={value!r}: give 'first', 'always' (True) or 'never' (False)") from None


def replica_crcs(leaves: Iterable[ArrayLeaf], copies: Collection[Path] | None = None) -> Crcs:
    """Return path and a CRC32 of each replicated array, of its bytes in C order; reads every byte of them.

    With `copies`, the paths of sharded arrays of which several ranks hold the same box, so too of the boxes of these
    and of arrays that are split by hand (see `box_crcs`).
    """
    leaves = tuple(leaves)
    found = [
        (leaf.path, leaf, leaf.parts[0]) for leaf in leaves if leaf.placement is Placement.REPLICATED and leaf.parts
    ]
    if copies is not None:
        found += _boxes(leaf for leaf in leaves if leaf.by_hand or leaf.path in copies)
    return _crcs(found)


def whole_crcs(leaves: Iterable[ArrayLeaf]) -> Crcs:
    """Return path and a CRC32 of arrays that a rank holds as a whole."""
    return _crcs([(leaf.path, leaf, part) for leaf in leaves for part in leaf.parts])


def box_crcs(leaves: Iterable[ArrayLeaf]) -> Crcs:
    """Return a CRC32 of each box of sharded arrays, under the array's path with the box as a last key."""
    return _crcs(_boxes(leaves))


def box_path(path: Path, box: Box) -> Path:
    """Return under what a box of an array is compared."""
    ends = zip(box.offset, box.shape, strict=True)
    return (*path, f"[{', '.join(f'{start}:{start + length}' for start, length in ends)}]")


def _is_box(path: Path) -> bool:
    last = path[-1]
    return isinstance(last, str) and last.startswith("[") and last.endswith("]")


def _boxes(leaves: Iterable[ArrayLeaf]) -> list[tuple[Path, ArrayLeaf, Part]]:
    return [(box_path(leaf.path, part.box), leaf, part) for leaf in leaves for part in leaf.parts]


def _crcs(compared: Iterable[tuple[Path, ArrayLeaf, Part]]) -> Crcs:
    """Return the CRC32 of the CRC32s of each part's blocks.

    What lies in host memory is read in one call of the C core, by its threads.
    """
    found: dict[Path, int] = {}
    rows = []
    blocks = [0]
    in_host: list[Path] = []
    for path, leaf, part in compared:
        memory, dtype, shape = part.memory, DTYPES[leaf.dtype], part.box.shape
        if isinstance(memory, HostMemory):
            nbytes, first = part.box.volume * dtype.itemsize, blocks[-1]
            source = (memory.address, memory.low, memory.nbytes)
            place = (first * BLOCK_NBYTES, nbytes, first)
            rows.append(copy_row(*place, dtype.itemsize, source, shape, shape, memory.strides))
            blocks.append(first - (-nbytes // BLOCK_NBYTES))
            in_host.append(path)
        else:
            host = np.empty(shape, dtype.numpy)
            memory.copy_to_host(host)
            found[path] = _crc_of(host)
    crcs = np.zeros(blocks[-1], np.uint32)
    plan = CopyPlan.of(rows)
    _native.pack(0, blocks[-1] * BLOCK_NBYTES, plan.ops, plan.index, BLOCK_NBYTES, crcs, copy_threads())
    for path, first, last in zip(in_host, blocks[:-1], blocks[1:], strict=True):
        found[path] = _native.crc32(crcs[first:last])
    return tuple(found.items())


def _crc_of(array: np.ndarray[Any, Any]) -> int:
    """Return what `replica_crcs` says of an array, so that a rank may hold its replica in another memory."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    blocks = [_native.crc32(data[start : start + BLOCK_NBYTES]) for start in range(0, data.size, BLOCK_NBYTES)]
    return _native.crc32(np.asarray(blocks, np.uint32))


def with_aliases(crcs: Crcs, aliases: Mapping[Path, Path]) -> Crcs:
    """Return CRCs with those of the further names of tied arrays: on another rank such a name may be an array's own."""
    of_first = dict(crcs)
    return (*crcs, *((path, of_first[first]) for path, first in aliases.items() if first in of_first))


def encode_crcs(crcs: Crcs) -> bytes:
    """Return paths and CRCs as one message, equal for equal replicas in any order; empty where there are none."""
    if not crcs:
        return b""
    by_path = sorted((json.dumps(path), crc) for path, crc in crcs)
    paths = json.dumps([path for path, _ in by_path]).encode()
    return _PATHS_NBYTES.pack(len(paths)) + paths + np.asarray([crc for _, crc in by_path], "<u4").tobytes()


def decode_crcs(message: bytes) -> Crcs:
    """Return what `encode_crcs` was called on, by path; raises `SaveFailedError` where the message is damaged."""
    if not message:
        return ()
    try:
        end = _PATHS_NBYTES.size + _PATHS_NBYTES.unpack_from(message)[0]
        paths = _paths(message[_PATHS_NBYTES.size : end])
        return tuple(zip(paths, np.frombuffer(message[end:], "<u4").tolist(), strict=True))
    except (ValueError, TypeError, struct.error) as error:
        raise SaveFailedError(f"a rank's planning message is damaged ({error}); nothing was written") from error


# Ranks that differ mostly differ in the CRCs, and there are as many messages as such ranks.
@lru_cache(maxsize=64)
def _paths(data: bytes) -> tuple[Path, ...]:
    return tuple(tuple(json.loads(path)) for path in json.loads(data))


_PLAIN = (
    "A plain tensor or array that ranks have under one name counts as copies of one, "
    "of which one is stored. Where each rank has a part of a larger array, say how it is split with "
    "ckptengine.Sharded(model, {names: ckptengine.Shard(dim, group)}), or pass a DTensor or "
    "ckptengine.ShardedArray(local, global_shape, offset); where each has its own, wrap it, or the module "
    "and its optimizer, in ckptengine.PerRank; where they should be equal, find out why they drifted apart "
    "(check_replicas='never' stores one of them unseen)"
)
_BOXES = (
    "Ranks that hold the same part of an array under one name count as replicas, of which one is stored. Where groups "
    "of ranks have different ones, as of experts, give each a name of its own (ckptengine.Renumbered does, for lists "
    "of modules), or declare plain tensors as parts of one stack with ckptengine.Sharded; where they should be equal, "
    "find out why they are not, such as other random numbers at the start (check_replicas='never' stores one of them "
    "unseen)"
)
_GROUPS = (
    "Optimizers' groups that hold tensors are joined over the ranks by their places in the list, so each must have the "
    "same numbers wherever it is: give hyperparameters that differ between stages as plain numbers (then such groups "
    "stay apart), or make the same groups in the same order on all ranks, with an empty one where a rank has no "
    "parameter for it"
)


def compare_replicas(said: Sequence[tuple[Sequence[int], Crcs]]) -> None:
    """Compare the replicated arrays of all ranks, and boxes of others, given ranks and what they say of theirs.

    Raises `ReplicaMismatchError` naming leaves and ranks.
    """
    first: dict[Path, tuple[int, int]] = {}
    differing: dict[Path, list[int]] = {}
    for ranks, crcs in said:
        for path, crc in crcs:
            if crc != first.setdefault(path, (min(ranks), crc))[1]:
                differing.setdefault(path, []).extend(ranks)
    if not differing:
        return
    lines = [
        f"{dotted(path)}: the replicas on {name_ranks(ranks)} differ from that of rank {first[path][0]}"
        for path, ranks in list(differing.items())[:_NAMED]
    ]
    more = f"; and {len(differing) - _NAMED} more leaves" if len(differing) > _NAMED else ""
    advice = _BOXES if all(_is_box(path) for path in differing) else _PLAIN
    if all(GROUPS in path[1:] for path in differing):
        advice = _GROUPS
    raise ReplicaMismatchError(f"{'; '.join(lines)}{more}. {advice}")
