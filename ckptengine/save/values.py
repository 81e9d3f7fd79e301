"""The plain values of a state as they are stored, and the digests by which ranks compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.archive.image import group_metadata
from ckptengine.archive.names import OBJECTS, rank_node
from ckptengine.errors import ReplicaMismatchError
from ckptengine.schema.path import Key, Path, dotted, path_order
from ckptengine.schema.ranks import name_ranks
from ckptengine.state.tree import FlatState
from ckptengine.state.values import digest, encode

__all__ = ["DIGEST_NBYTES", "StoredValues", "compare_values", "stored_values"]

DIGEST_NBYTES = 8


@dataclass(frozen=True, slots=True)
class StoredValues:
    """Typed JSON of one rank: `shared` for the group `objects`, `own` for the rank's group.

    `paths` are the replicated values' paths in order, `digests` their digests of 8 bytes each, concatenated.
    """

    shared: dict[str, Any]
    own: dict[str, Any]
    paths: tuple[Path, ...]
    digests: bytes

    def entries(self, rank: int) -> list[tuple[str, bytes]]:
        """Return the archive entries in which this rank stores them: `shared` is written by rank 0."""
        entries = [(f"{rank_node(rank)}/zarr.json", group_metadata({"ckptengine": self.own}))]
        if rank == 0:
            entries.insert(0, (f"{OBJECTS}/zarr.json", group_metadata({"ckptengine": self.shared})))
        return entries


def stored_values(flat: FlatState) -> StoredValues:
    """Return the plain values of a flattened state as they are stored.

    Raises `StateError` naming path and type of a value that typed JSON can't hold.
    """
    shared = [
        (path, encode(value, path)) for path, value in sorted(flat.values.items(), key=lambda item: path_order(item[0]))
    ]
    own = [(path, encode(value, path)) for path, value in flat.rank_values.items()]
    return StoredValues(
        shared={
            "values": [[list(path), value] for path, value in shared],
            "aliases": [[list(path), list(target)] for path, target in flat.aliases.items()],
            "containers": [[list(path), kind] for path, kind in flat.containers.items()],
            "structure": flat.outline.encoded,
        },
        own={
            "values": [[list(path), value] for path, value in own],
            "containers": [[list(path), kind] for path, kind in flat.rank_containers.items()],
            "structure": flat.rank_outline.encoded,
        },
        paths=tuple(path for path, _ in shared),
        digests=b"".join(digest([list(path), value])[:DIGEST_NBYTES] for path, value in shared),
    )


def compare_values(said: Sequence[tuple[Sequence[Path], bytes]]) -> None:
    """Compare the replicated values of all ranks, given each rank's paths and digests.

    Raises `ReplicaMismatchError` naming keys and ranks.
    """
    paths, digests = said[0]
    keys = {tuple(map(_typed, path)) for path in paths}
    problems: dict[str, list[int]] = {}
    for rank, (own_paths, own) in enumerate(said):
        odd = keys ^ {tuple(map(_typed, path)) for path in own_paths}
        for typed in odd:
            name = dotted(tuple(key for _, key in typed))
            problems.setdefault(f"{name}: not on all of rank 0 and", []).append(rank)
        if odd or own == digests:
            continue
        for number, path in enumerate(paths):
            part = slice(number * DIGEST_NBYTES, (number + 1) * DIGEST_NBYTES)
            if own[part] != digests[part]:
                problems.setdefault(f"{dotted(tuple(path))}: not rank 0's on", []).append(rank)
    if problems:
        lines = [f"{what} {name_ranks(ranks)}" for what, ranks in problems.items()]
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ReplicaMismatchError(
            f"replicated values differ between ranks: {'; '.join(lines[:8])}{more}. Make them equal on all ranks, or "
            "wrap what differs by rank in ckptengine.PerRank"
        )


def _typed(key: Key) -> tuple[str, Key]:
    return type(key).__name__, key
