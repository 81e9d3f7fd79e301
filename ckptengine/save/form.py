"""How the shared part of a rank's state is built: what ranks must agree on beside arrays and plain values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import CheckpointDamagedError, ReplicaMismatchError, SaveFailedError
from ckptengine.schema.path import Path, dotted
from ckptengine.state.forms import Form
from ckptengine.state.outline import Outline, decode_outline
from ckptengine.state.union import conflict_of, other_items, other_outline

__all__ = ["SharedForm", "check_forms", "decode_form"]

_MANY = 1 << 30  # leaves that an outline of a rank of this job may be for: it is no file from elsewhere


@dataclass(frozen=True, slots=True)
class SharedForm:
    """Containers and aliases as `FlatState` has them, the outline, and the names of the parameters in optimizers'
    groups: those of each group by the path of the list that the groups are, or, where they hold tensors, by the path of
    each group."""

    containers: Mapping[Path, Form]
    aliases: Mapping[Path, Path]
    outline: Outline
    groups: Mapping[Path, Sequence[Sequence[str]]]

    def encode(self) -> bytes:
        """Return the form as one message, equal for equal forms."""
        return json.dumps(
            {
                "containers": [[list(path), form] for path, form in self.containers.items()],
                "aliases": [[list(path), list(target)] for path, target in self.aliases.items()],
                "structure": self.outline.encoded,
                "groups": [[list(path), groups] for path, groups in self.groups.items()],
            }
        ).encode()

    def things(self) -> set[tuple[str, Path]]:
        """Return what of it a rank stores that is the first to have it: containers, further names of tensors, and what
        is said of arrays beside their contents, each by what it is and its path."""
        outline = self.outline
        tables: dict[str, Iterable[Path]] = {
            "container": outline.by_path, "form": self.containers, "alias": self.aliases, "order": outline.orders,
            "shape": outline.shapes, "metadata": outline.metadata, "spread": outline.spreads, "kind": outline.kinds,
        }  # fmt: skip
        return {(what, path) for what, paths in tables.items() for path in paths}

    def beside(self, others: Sequence[SharedForm]) -> dict[str, Any]:
        """Return what is stored of this form where that of others is stored elsewhere; empty where that is nothing."""
        containers = other_items(self.containers, [one.containers for one in others])
        aliases = other_items(self.aliases, [one.aliases for one in others])
        outline = other_outline(self.outline, [one.outline for one in others])
        document: dict[str, Any] = {}
        if containers:
            document["containers"] = [[list(path), form] for path, form in containers.items()]
        if aliases:
            document["aliases"] = [[list(path), list(target)] for path, target in aliases.items()]
        if any((outline.containers, outline.orders, outline.shapes, outline.metadata, outline.spreads, outline.empty,
                outline.kinds)):  # fmt: skip
            document["structure"] = outline.encoded
        return document


def decode_form(message: bytes) -> SharedForm:
    """Return the form that `encode` was called on; raises `SaveFailedError` where the message is damaged."""
    try:
        document = json.loads(message)
        return SharedForm(
            {tuple(path): form for path, form in document["containers"]},
            {tuple(path): tuple(target) for path, target in document["aliases"]},
            decode_outline(document["structure"], _MANY),
            {tuple(path): groups for path, groups in document["groups"]},
        )
    except (ValueError, KeyError, TypeError, CheckpointDamagedError) as error:
        raise SaveFailedError(f"a rank's planning message is damaged ({error}); nothing was written") from error


def check_forms(forms: Sequence[tuple[int, SharedForm]]) -> None:
    """Raise `ReplicaMismatchError` where ranks, each given with its form, have different things under one path."""
    problems: list[str] = []
    built: dict[Path, tuple[int, Any]] = {}
    held: dict[Path, tuple[int, Form]] = {}
    for rank, form in forms:
        for path, found in form.outline.by_path.items():
            first, known = built.setdefault(path, (rank, found))
            reason = None if known is found else conflict_of(known, found)
            if reason is not None:
                problems.append(f"{dotted(path)}: {reason} (ranks {first} and {rank})")
        for path, kind in form.containers.items():
            first, before = held.setdefault(path, (rank, kind))
            if before != kind:
                problems.append(f"{dotted(path)}: {before} on rank {first}, {kind} on rank {rank}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ReplicaMismatchError(
            f"the ranks have different objects under one name: {'; '.join(problems[:8])}{more}. Give each a name of "
            "its "
            "own, or wrap what differs by rank in ckptengine.PerRank"
        )
