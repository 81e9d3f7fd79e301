"""The plain values of a state as they are stored, and the digests by which ranks compare them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.archive.image import group_metadata
from ckptengine.archive.names import OBJECTS, rank_node
from ckptengine.errors import ReplicaMismatchError
from ckptengine.save.form import SharedForm
from ckptengine.schema.path import Path, dotted, path_order
from ckptengine.schema.ranks import name_ranks
from ckptengine.state.outline import Outline
from ckptengine.state.tree import FlatState
from ckptengine.state.union import NAMED
from ckptengine.state.values import digest, encode

__all__ = [
    "DIGEST_NBYTES",
    "StoredValues",
    "compare_values",
    "group_name",
    "group_path",
    "said_as",
    "stored_path",
    "stored_values",
]

DIGEST_NBYTES = 8
_GROUP_OF = "the group of "
_EMPTY_GROUP = re.compile(r"group \d+, without parameters")


@dataclass(frozen=True, slots=True)
class StoredValues:
    """Typed JSON of one rank: `shared` for the group `objects`, `own` for the rank's group.

    `paths` are those of what ranks that have it must have the same of, in order: the replicated values, and the
    hyperparameters of each group of an optimizer (`group_path`); `digests` are 8 bytes for each. `named` are the groups
    themselves, by the path of their list; or, by the path of each, those that hold tensors, with nothing but the names
    of their parameters. `form` is how what is shared is built.
    """

    shared: dict[str, Any]
    own: dict[str, Any]
    paths: tuple[Path, ...]
    digests: bytes
    named: Mapping[Path, Any] = field(default_factory=dict)
    form: SharedForm = field(default_factory=lambda: SharedForm({}, {}, Outline(), {}))

    def entries(
        self, rank: int, shared: Mapping[str, Any] | None = None, items: Mapping[str, Any] | None = None
    ) -> list[tuple[str, bytes]]:
        """Return the archive entries in which this rank stores them.

        What all ranks share is written by rank 0; `shared` is what another one stores of it, empty: nothing.
        `items` tell what its objects have, where those of other ranks have other items.
        """
        own = {**self.own, **({"shared": shared} if shared else {}), **(items or {})}
        entries = [(f"{rank_node(rank)}/zarr.json", group_metadata({"ckptengine": own}))]
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
    named = _named(flat, dict(shared)) if flat.groups else {}
    left_out = {(*path, name) for path, group in named.items() if isinstance(group, dict) for name in group}
    said: list[tuple[Path, list[Any]]] = []
    for path, value in shared:
        where = list(path)
        if path in named:
            said += [
                (group_path(path, n, group["params"]), [where, _others(group)]) for n, group in enumerate(named[path])
            ]
        elif path not in left_out:
            said.append((path, [where, value]))
    names = {
        path: [group["params"] for group in ([groups] if isinstance(groups, dict) else groups)]
        for path, groups in named.items()
    }
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
        paths=tuple(path for path, _ in said),
        digests=b"".join(digest(what)[:DIGEST_NBYTES] for _, what in said),
        named=named,
        form=SharedForm(flat.containers, flat.aliases, flat.outline, names),
    )


def _named(flat: FlatState, shared: Mapping[Path, Any]) -> dict[Path, Any]:
    """Return the optimizers' groups, where all parameters in them have names: see `StoredValues.named`."""
    found: dict[Path, Any] = {}
    for path in flat.groups:
        groups = shared.get(path)
        if isinstance(groups, list):
            found[path] = groups
            continue
        number = 0
        while "params" in (group := {n: shared[*path, number, n] for n in NAMED if (*path, number, n) in shared}):
            found[*path, number] = group
            number += 1
    return {path: groups for path, groups in found.items() if _all_named([groups] if type(groups) is dict else groups)}


def _all_named(groups: Iterable[Any]) -> bool:
    return all(
        type(group) is dict
        and type(group.get("params")) is list
        and all(type(name) is str for name in group["params"])
        and len(group.get("param_names") or group["params"]) == len(group["params"])
        for group in groups
    )


def _others(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in NAMED}


def group_path(path: Path, number: int, names: Sequence[str]) -> Path:
    """Return under what the hyperparameters of a group are compared, given the path of the groups, and the names of
    its parameters: ranks have the same group where they have the same parameters in it."""
    return (*path, f"{_GROUP_OF}{min(names)}" if names else f"group {number}, without parameters")


def group_name(path: Path) -> str | None:
    """Return the name of the parameter from which `group_path` has made a path, None for other paths."""
    last = path[-1]
    return last.removeprefix(_GROUP_OF) if isinstance(last, str) and last.startswith(_GROUP_OF) else None


def stored_path(path: Path) -> Path:
    """Return where what is compared under a path is stored: a group lies in the list of the optimizer's groups."""
    last = path[-1]
    is_group = isinstance(last, str) and (last.startswith(_GROUP_OF) or _EMPTY_GROUP.fullmatch(last))
    return path[:-1] if is_group else path


def said_as(path: Path) -> str:
    """Return how messages name what is compared under a path."""
    where = stored_path(path)
    return dotted(path) if where == path else f"{dotted(where)} ({path[-1]})"


def compare_values(said: Sequence[tuple[Sequence[int], Sequence[Path], bytes]]) -> None:
    """Compare what ranks that have it must have the same of, given ranks and their paths and digests.

    Not all need to have everything. Raises `ReplicaMismatchError` naming keys and ranks.
    """
    first: dict[Path, tuple[int, bytes]] = {}
    problems: dict[Path, list[int]] = {}
    for ranks, paths, digests in sorted(said, key=lambda one: min(one[0])):
        for number, path in enumerate(paths):
            part = digests[number * DIGEST_NBYTES : (number + 1) * DIGEST_NBYTES]
            if first.setdefault(path, (min(ranks), part))[1] != part:
                problems.setdefault(path, []).extend(ranks)
    if problems:
        lines = [f"{said_as(path)}: not rank {first[path][0]}'s on {name_ranks(r)}" for path, r in problems.items()]
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ReplicaMismatchError(
            f"replicated values differ between ranks: {'; '.join(lines[:8])}{more}. Make them equal on all ranks, or "
            "wrap what differs by rank in ckptengine.PerRank"
        )
