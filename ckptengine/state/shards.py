"""What is said of plain tensors that are split by hand: which dimension, over which ranks, in which parts."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import StateError
from ckptengine.frameworks.registry import adapters
from ckptengine.schema.ranks import name_ranks
from ckptengine.state.cut import Cut
from ckptengine.state.per_rank import PerRank

__all__ = ["Declaration", "Pattern", "Renumbered", "Rule", "Shard", "group_ranks", "rules_of"]

Parts = Mapping[str, int] | Sequence[str]


class Shard:
    """Declare that ranks have parts of a tensor along one dimension, in the order of the ranks in a group.

    - `dim`: the dimension.
    - `group`: a torch process group or a `DeviceMesh` of one dimension, the name of a MindSpore group, the global ranks
      in order, or None for all ranks. Ranks may have different lengths. Ranks outside of the group have replicas of the
      same parts, in groups of their own.
    - `parts`: for a tensor that consists of several ones after each other, each of which is split: a fused gate and up
      projection, or a fused query, key and value. A list of names for equal parts, or a dict from names to sizes in any
      unit, such as the number of heads; the parts share the dimension in that proportion. The checkpoint has what one
      rank alone would have: the whole first part, then the whole second part.

    Raises `ValueError` for parts without names or with sizes below 1.
    """

    __slots__ = ("dim", "group", "parts")

    def __init__(self, dim: int, group: Any = None, *, parts: Parts | None = None) -> None:
        self.dim = operator.index(dim)
        self.group = group
        self.parts: dict[str, int] | None = None
        if parts is not None:
            sized = parts.items() if isinstance(parts, Mapping) else [(name, 1) for name in _texts(parts)]
            self.parts = {name: operator.index(size) for name, size in sized}
            if len(self.parts) != len(parts) or not self.parts or min(self.parts.values()) < 1:
                raise ValueError(f"Shard: parts={parts!r}; give each part a name of its own and a size of at least 1")

    def lengths(self, length: int) -> list[int] | None:
        """Return the lengths of the parts in a dimension of this length; None where it can't be shared like that."""
        if self.parts is None:
            return [length]
        whole = sum(self.parts.values())
        if any(length * size % whole for size in self.parts.values()):
            return None
        return [length * size // whole for size in self.parts.values()]

    def __repr__(self) -> str:
        parts = "" if self.parts is None else f", parts={self.parts}"
        return f"Shard({self.dim}, group={self.group!r}{parts})"


class Renumbered:
    """Declare that each rank of a group has other modules in a list, and number them on from rank to rank.

    If every rank has its own experts as `experts.0` and `experts.1`, those of rank 1 are saved as `experts.2` and
    `experts.3`. `group` is as for `Shard`; ranks may have different numbers of modules.
    """

    __slots__ = ("group",)

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __repr__(self) -> str:
        return f"Renumbered(group={self.group!r})"


class Declaration:
    """A value of the state of which is known what its tensors are, by their dotted names in it.

    `cuts` tells how tensors are split, `own` which ones each rank has its own of, and `shifts` by how much the numbers
    in the lists of modules with these names are greater in the checkpoint. `moments` are keys of optimizer states that
    have the shape of their parameter, and an element for each of its elements.
    """

    __slots__ = ("__weakref__", "_rules", "cuts", "moments", "own", "shifts", "value")

    value: Any
    cuts: Mapping[str, Cut]
    own: frozenset[str]
    moments: frozenset[str]
    shifts: Mapping[str, int]
    _rules: Sequence[Rule]

    def says(self, name: str) -> bool:
        """Whether a pattern fits a name."""
        return any(rule.pattern.match(name) for rule in self._rules if rule.numbered is None)

    def global_name(self, name: str) -> str:
        """Return the name that a tensor has over all ranks."""
        for prefix, shift in self.shifts.items():
            if name.startswith(f"{prefix}."):
                number, dot, rest = name[len(prefix) + 1 :].partition(".")
                name = f"{prefix}.{int(number) + shift}{dot}{rest}"
        return name


@dataclass(frozen=True, slots=True)
class Rule:
    """What is said of the tensors that a pattern names: `shards`, that each rank has its own, or a new numbering."""

    pattern: Pattern
    shards: tuple[Shard, ...] = ()
    own: bool = False
    numbered: Renumbered | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """A dotted name, or the beginning of one, with `*` for any text without a dot and `**` for any text."""

    text: str

    def match(self, name: str) -> re.Match[str] | None:
        """Return what of a name the pattern stands for, None where it does not fit."""
        return self._expression.match(name)

    @property
    def _expression(self) -> re.Pattern[str]:
        if not self.text:
            return re.compile("")
        found = re.split(r"(\*\*\.?|\*)", self.text)
        wild = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*"}
        return re.compile("".join(wild.get(text) or re.escape(text) for text in found) + r"(?=\.|\Z)")


def rules_of(rules: Any) -> list[Rule]:
    """Return the rules of a mapping from patterns to `Shard`, a list of them, `Renumbered` or the class `PerRank`.

    Raises `TypeError` for anything else.
    """
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(f"Sharded: {rules!r} has no rules; give a dict from names to ce.Shard, or dim= and group=")
    return [_rule(pattern, said) for pattern, said in rules.items()]


def _rule(text: Any, said: Any) -> Rule:
    if not isinstance(text, str):
        raise TypeError(f"Sharded: {text!r} is not a name or pattern; use text such as '**.qkv.weight'")
    pattern = Pattern(text)
    if isinstance(said, Shard):
        return Rule(pattern, (said,))
    if isinstance(said, Renumbered):
        return Rule(pattern, numbered=said)
    if said is PerRank:
        return Rule(pattern, own=True)
    if isinstance(said, (list, tuple)) and said and all(isinstance(one, Shard) for one in said):
        return Rule(pattern, tuple(said))
    raise TypeError(
        f"Sharded: {text!r}: {said!r}; say ce.Shard(dim, group), a list of these, the outermost first, "
        "ce.Renumbered(group), or the class ce.PerRank"
    )


def group_ranks(group: Any, rank: int, world_size: int) -> tuple[int, ...]:
    """Return the global ranks of a group in its order.

    Raises `StateError` where it is no group, or this rank is not in it.
    """
    ranks = _ranks(group, world_size)
    if ranks is None:
        raise StateError(
            f"Sharded: group={group!r} is not a group; pass a process group, a DeviceMesh of one dimension, the name "
            "of a "
            "MindSpore group, the global ranks in their order, or None for all ranks"
        )
    if rank not in ranks or len(set(ranks)) != len(ranks) or not all(0 <= one < world_size for one in ranks):
        raise StateError(
            f"Sharded: a group of {name_ranks(ranks) if ranks else 'no ranks'}, on rank {rank} of {world_size}; each "
            "rank passes the group that it is in itself"
        )
    return ranks


def _ranks(group: Any, world_size: int) -> tuple[int, ...] | None:
    if group is None:
        return tuple(range(world_size))
    for adapter in adapters():
        ranks = adapter.group_ranks(group)
        if ranks is not None:
            return tuple(ranks)
    if isinstance(group, Iterable) and not isinstance(group, (str, bytes)):
        return tuple(operator.index(one) for one in group)
    return None


def _texts(names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Shard: parts={names!r}; give a list of names, or a dict from names to sizes")
    return names
