"""Where each rank's part of split tensors lies, from what all ranks tell of theirs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from ckptengine.comm.agree import on_all
from ckptengine.comm.base import Communicator
from ckptengine.comm.distinct import Distinct, gather_distinct
from ckptengine.errors import StateError
from ckptengine.schema.box import Box
from ckptengine.schema.ranks import name_ranks
from ckptengine.state.cut import Cut

__all__ = ["Meeting", "Told", "ToldShard", "meet"]

_UNNAMED = "the tensor"

Run = tuple[int, int, int]
"""Where a stretch of a dimension begins in the global array, where in the local one, and its length."""


@dataclass(frozen=True, slots=True)
class ToldShard:
    """One split of a tensor: its dimension, this rank's lengths of the parts by name, the number of the group."""

    dim: int
    parts: tuple[tuple[str, int], ...]
    group: int


@dataclass(frozen=True, slots=True)
class Told:
    """What a rank tells: its split tensors by name with shape and splits, its lists of modules by name with the
    number of modules and of the group, which of the patterns have fitted a name, and its groups of ranks."""

    leaves: Mapping[str, tuple[tuple[int, ...], tuple[ToldShard, ...]]]
    lists: Mapping[str, tuple[int, int]]
    fitted: tuple[bool, ...]
    groups: tuple[tuple[int, ...], ...] = field(default=())

    def encode(self) -> tuple[bytes, bytes]:
        """Return the groups by themselves: all else is the same on most ranks."""
        leaves = {
            name: [shape, [[one.dim, one.parts, one.group] for one in shards]]
            for name, (shape, shards) in self.leaves.items()
        }
        return json.dumps([leaves, self.lists, self.fitted]).encode(), json.dumps(self.groups).encode()

    @classmethod
    def decode(cls, document: bytes, groups: bytes) -> Told:
        """Return what `encode` was called on."""
        leaves, lists, fitted = json.loads(document)
        return cls(
            {
                name: (
                    tuple(shape),
                    tuple(ToldShard(dim, tuple(map(tuple, parts)), group) for dim, parts, group in shards),
                )
                for name, (shape, shards) in leaves.items()
            },
            {name: (count, group) for name, (count, group) in lists.items()},
            tuple(fitted),
            _groups(groups),
        )


def _groups(document: bytes) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, json.loads(document)))


def meet(comm: Communicator, told: Told, timeout: float) -> Meeting:
    """Return what all ranks tell; all ranks call it."""
    if comm.world_size == 1:
        return Meeting(0, [told])
    document, groups = told.encode()
    _, (all_documents, all_groups) = gather_distinct(comm, b"", [document, groups], timeout)
    meeting = Meeting(comm.rank, _Messages(all_documents, all_groups))
    on_all(comm, meeting.check_groups, timeout, "declaring how tensors are split")
    return meeting


class _Messages(Sequence[Told]):
    """What all ranks have told, read when it is asked for: a rank needs what those in its groups say.

    Most ranks say the same of their tensors, and each has groups of its own: what is the same is read once.
    """

    def __init__(self, documents: Distinct, groups: Distinct) -> None:
        self._documents, self._groups = documents, groups
        self.distinct = [Told.decode(one, b"[]") for one in documents.documents]
        self._known: dict[int, Told] = {}

    def __len__(self) -> int:
        return len(self._documents.of_rank)

    @overload
    def __getitem__(self, rank: int) -> Told: ...

    @overload
    def __getitem__(self, rank: slice) -> Sequence[Told]: ...

    def __getitem__(self, rank: int | slice) -> Told | Sequence[Told]:
        if isinstance(rank, slice):
            return [self[one] for one in range(len(self))[rank]]
        if rank not in self._known:
            groups = _groups(self._groups.documents[self._groups.of_rank[rank]])
            self._known[rank] = replace(self.distinct[self._documents.of_rank[rank]], groups=groups)
        return self._known[rank]


class Meeting:
    """What all ranks have told, by rank."""

    def __init__(self, rank: int, told: Sequence[Told]) -> None:
        self._rank, self._told = rank, told
        self._distinct = told.distinct if isinstance(told, _Messages) else told
        self._known: dict[tuple[str, int, int, int], tuple[int, ...]] = {}

    def unfitted(self) -> list[int]:
        """Return the numbers of the patterns that fit nothing on any rank."""
        fitted = zip(*(one.fitted for one in self._distinct), strict=True)
        return [number for number, fits in enumerate(fitted) if not any(fits)]

    def shift(self, name: str) -> int:
        """Return how many modules the ranks before this one in its group have in a list."""
        _, group = self._told[self._rank].lists[name]
        ranks = self._told[self._rank].groups[group]
        return sum(self._told[one].lists.get(name, (0, 0))[0] for one in ranks[: ranks.index(self._rank)])

    def check_groups(self) -> None:
        """Raise `StateError` where the ranks of this one's groups don't say the same of their tensors and lists."""
        mine = self._told[self._rank]
        if len({len(one.fitted) for one in self._distinct}) > 1:
            counts = [len(self._told[rank].fitted) for rank in range(len(self._told))]
            said = [
                f"{count} on {name_ranks([rank for rank, one in enumerate(counts) if one == count])}"
                for count in sorted(set(counts))
            ]
            raise StateError(
                f"Sharded: ranks have given different numbers of rules: {', '.join(said)}; give all ranks the same "
                "patterns, also those that fit nothing on some ranks"
            )
        for name, (shape, shards) in mine.leaves.items():
            for level, shard in enumerate(shards):
                for other in mine.groups[shard.group]:
                    self._check_leaf(name, shape, shards, level, other)
        for name, (_, group) in mine.lists.items():
            for other in mine.groups[group]:
                theirs = self._told[other].lists.get(name)
                if theirs is not None and self._told[other].groups[theirs[1]] != mine.groups[group]:
                    raise StateError(f"Sharded: {name or _UNNAMED}: {self._other_group(mine.groups[group], other)}")

    def _check_leaf(
        self, name: str, shape: tuple[int, ...], shards: tuple[ToldShard, ...], level: int, other: int
    ) -> None:
        mine, theirs, shard = self._told[self._rank], self._told[other], shards[level]
        if name not in theirs.leaves:
            raise StateError(
                f"Sharded: {name or _UNNAMED}: declared on rank {self._rank}, not on rank {other} of its group "
                f"({name_ranks(mine.groups[shard.group])}); declare the same on all ranks of a group (a rank that has "
                "nothing passes a tensor with a length of 0)"
            )
        there, said = theirs.leaves[name]
        if [(one.dim, [part for part, _ in one.parts]) for one in said] != [
            (one.dim, [part for part, _ in one.parts]) for one in shards
        ]:
            raise StateError(
                f"Sharded: {name or _UNNAMED}: declared as {_words(shards)} on rank {self._rank}, "
                f"as {_words(said)} on rank {other}"
            )
        if theirs.groups[said[level].group] != mine.groups[shard.group]:
            raise StateError(f"Sharded: {name or _UNNAMED}: {self._other_group(mine.groups[shard.group], other)}")
        if len(there) != len(shape) or any(
            here != length for dim, (here, length) in enumerate(zip(shape, there, strict=True)) if dim != shard.dim
        ):
            raise StateError(
                f"Sharded: {name or _UNNAMED}: shape {shape} on rank {self._rank}, {there} on rank {other}; "
                f"of parts along dimension {shard.dim} the other lengths must be equal"
            )

    def _other_group(self, ranks: Iterable[int], other: int) -> str:
        return (
            f"the group of rank {self._rank} is {list(ranks)}, and rank {other}, which is in it, is itself in another "
            "one; pass the same group on all of its ranks"
        )

    def cut(self, name: str) -> Cut:
        """Return how this rank's tensor is cut; `check_groups` has found nothing wrong."""
        shape, shards = self._told[self._rank].leaves[name]
        runs: list[list[Run]] = []
        parts: list[tuple[int, tuple[int, ...]]] = []
        whole = []
        for dim, length in enumerate(shape):
            levels = sum(shard.dim == dim for shard in shards)
            if not levels:
                whole.append(length)
                runs.append([(0, 0, length)])
                continue
            sizes, local = self._sizes(name, dim, 0, self._rank), self._sizes(name, dim, levels, self._rank)
            starts = [0] * len(sizes)
            for level in range(levels):
                ranks = self._group(name, dim, level, self._rank)
                for other in ranks[: ranks.index(self._rank)]:
                    inner = self._sizes(name, dim, level + 1, other)
                    starts = [start + size for start, size in zip(starts, inner, strict=True)]
            whole.append(sum(sizes))
            if sum(sizes) != length:
                parts.append((dim, sizes))
            runs.append(_runs(sizes, local, starts))
        pieces = tuple(
            (Box(tuple(run[0] for run in each), lengths := tuple(run[2] for run in each)),
             Box(tuple(run[1] for run in each), lengths))
            for each in itertools.product(*runs)
        )  # fmt: skip
        groups = self._told[self._rank].groups
        about = "; ".join(f"{_words([shard])} over {name_ranks(groups[shard.group])}" for shard in shards)
        return Cut(tuple(whole), shape, pieces, frozenset(shard.dim for shard in shards), about, tuple(parts))

    def _levels(self, name: str, dim: int, rank: int) -> list[ToldShard]:
        return [shard for shard in self._told[rank].leaves[name][1] if shard.dim == dim]

    def _group(self, name: str, dim: int, level: int, rank: int) -> tuple[int, ...]:
        return self._told[rank].groups[self._levels(name, dim, rank)[level].group]

    def _sizes(self, name: str, dim: int, level: int, rank: int) -> tuple[int, ...]:
        """Return the lengths of the parts along a dimension that all ranks have together which share a rank's first
        `level` splits; at the last level those of the rank alone."""
        key = (name, dim, level, rank)
        if key not in self._known:
            levels = self._levels(name, dim, rank)
            if level == len(levels):
                named = max((shard.parts for shard in levels), key=len)
                self._known[key] = tuple(length for _, length in named)
            else:
                inner = [self._sizes(name, dim, level + 1, other) for other in self._group(name, dim, level, rank)]
                self._known[key] = tuple(map(sum, zip(*inner, strict=True)))
        return self._known[key]


def _runs(sizes: Sequence[int], local: Sequence[int], starts: Sequence[int]) -> list[Run]:
    """Return the stretches that a rank has of parts of these sizes; one where they follow each other in both arrays."""
    runs: list[Run] = []
    at, place = 0, 0
    for size, length, start in zip(sizes, local, starts, strict=True):
        new = (at + start, place, length)
        if runs and runs[-1][0] + runs[-1][2] == new[0]:
            new = (runs[-1][0], runs[-1][1], runs[-1][2] + length)
            runs.pop()
        runs.append(new)
        at, place = at + size, place + length
    return runs


def _words(shards: Iterable[ToldShard]) -> str:
    said = []
    for shard in shards:
        names = [name for name, _ in shard.parts if name]
        said.append(f"split along dimension {shard.dim}" + (f" in parts {', '.join(names)}" if names else ""))
    return ", then ".join(said)
