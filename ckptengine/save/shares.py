"""Who stores what of the values and containers that ranks share: each thing the lowest rank that has it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import SaveFailedError
from ckptengine.save.form import SharedForm, check_forms, decode_form
from ckptengine.save.values import StoredValues, compare_values, group_name, group_path, said_as
from ckptengine.schema.path import Path, path_order
from ckptengine.schema.ranks import name_ranks
from ckptengine.state.outside import outside_digest
from ckptengine.state.union import NAMED

__all__ = ["Said", "Shares", "Stored", "decode_said", "encode_said", "owners_of", "share_out"]

_SIZES = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Said:
    """What a rank has of what ranks share: paths and digests (see `StoredValues`), and the encoded form."""

    paths: tuple[Path, ...]
    digests: bytes
    form: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """What one rank stores of what ranks share, besides rank 0's own, for one save.

    `fresh` are the numbers of those of `StoredValues.paths` that it stores and of which no exchange has told the
    others. `form_digest` and `form` are empty where the form is that of the last exchange.
    """

    document: Mapping[str, Any]
    fresh: tuple[int, ...] = ()
    form_digest: str = ""
    form: bytes = b""


@dataclass(slots=True, eq=False)
class Shares:
    """What a rank knows, by the last exchange, of what the ranks share.

    `elsewhere` are the paths of values that lower ranks store, `names` those of parameters whose groups they store, by
    the path of the groups, and `lower` the forms that they store. `own` is this rank's form, `paths` its paths, `known`
    the same as a set. `first_names` leads from each parameter to the one by which ranks compare its group, where that
    is not the least of its names: groups that have a parameter in common are one. `owners` has the rank that stores
    each value. `aliases` are the further names of tensors of all distinct ranks, `in_part` the paths of this rank's
    objects of which ranks have different items. `forms` are all ranks' forms, `form_of_rank` the number of each rank's;
    on rank 0 only.
    """

    rank: int
    own: SharedForm
    paths: tuple[Path, ...]
    elsewhere: frozenset[Path] = frozenset()
    names: Mapping[Path, frozenset[str]] = field(default_factory=dict)
    lower: tuple[SharedForm, ...] = ()
    known: frozenset[Path] = frozenset()
    first_names: Mapping[Path, Mapping[str, str]] = field(default_factory=dict)
    owners: Mapping[Path, int] = field(default_factory=dict)
    forms: tuple[SharedForm, ...] = ()
    form_of_rank: tuple[int, ...] = ()
    aliases: tuple[frozenset[Path], ...] = ()
    in_part: frozenset[Path] = frozenset()
    stores: bool = False
    """Whether this rank, which is not rank 0, stores any of it, by the last exchange."""
    _last: tuple[SharedForm, dict[str, Any]] | None = None

    def compared(self, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        """Return the paths under which ranks compare what this one has."""
        return renamed_groups(paths, self.first_names)

    def items(self, values: StoredValues, arrays: Iterable[Path]) -> dict[str, Any]:
        """Return what this rank stores of which items its objects have, where other ranks' have others."""
        if not self.in_part:
            return {}
        paths = sorted({*values.paths, *values.form.aliases, *arrays}, key=path_order)
        inside = {one: [list(path[len(one) :]) for path in paths if path[: len(one)] == one] for one in self.in_part}
        return {
            "items": [[list(one), items] for one, items in sorted(inside.items()) if items],
            "outside": outside_digest(paths, values.form.outline.containers),
        }

    def stored(self, values: StoredValues) -> Stored:
        """Return what this rank stores beside what is its own."""
        form_digest, form = "", b""
        if not _same(values.form, self.own):
            form = values.form.encode()
            form_digest = hashlib.sha256(form).hexdigest()[:16]
        unchanged = not form_digest and (values.paths is self.paths or values.paths == self.paths)
        if self.rank == 0 or (unchanged and not self.stores):
            return Stored({}, (), form_digest, form)
        document = dict(self._beside(values.form))
        kept = [item for item in values.shared["values"] if self._keeps(tuple(item[0]), values.named)]
        if kept:
            document["values"] = kept
        groups, stored_groups = self._groups(values)
        if groups:
            document["groups"] = groups
        stored = {tuple(path) for path, _ in kept} | stored_groups
        fresh = (n for n, path in enumerate(values.paths) if path in stored and path not in self.known)
        return Stored(document, tuple(fresh), form_digest, form)

    def _keeps(self, path: Path, named: Mapping[Path, Any]) -> bool:
        """Whether a value is stored here as it is."""
        return path not in self.elsewhere and path not in named and not (path[-1] in NAMED and path[:-1] in named)

    def _beside(self, form: SharedForm) -> dict[str, Any]:
        """Return what is stored of a form, worked out once for all saves of one structure."""
        if self._last is None or not _same(self._last[0], form):
            self._last = form, form.beside(self.lower)
        return self._last[1]

    def _groups(self, values: StoredValues) -> tuple[list[Any], set[Path]]:
        """Return the groups that hold parameters which lower ranks don't have, and under what they are compared."""
        found: list[Any] = []
        stored: set[Path] = set()
        for path, groups in values.named.items():
            known = self.names.get(path, frozenset())
            if isinstance(groups, dict):
                if not known.issuperset(groups["params"]):
                    found.append([list(path), groups])
                continue
            mine = [n for n, group in enumerate(groups) if not known.issuperset(group["params"])]
            if mine:
                found.append([list(path), [groups[n] for n in mine]])
                stored |= {group_path(path, n, groups[n]["params"]) for n in mine}
        return found, stored


def _same(one: SharedForm, other: SharedForm) -> bool:
    """Whether two forms are the same; those of one walk are the same objects."""
    return (
        (one.outline is other.outline or one.outline == other.outline)
        and (one.containers is other.containers or one.containers == other.containers)
        and (one.aliases is other.aliases or one.aliases == other.aliases)
        and one.groups == other.groups
    )


def encode_said(values: StoredValues) -> bytes:
    """Return what a rank tells of what ranks share as one document, equal where they have the same."""
    paths, form = json.dumps([list(path) for path in values.paths]).encode(), values.form.encode()
    return _SIZES.pack(len(paths), len(form)) + paths + form + values.digests


def decode_said(document: bytes) -> Said:
    """Return what `encode_said` was called on."""
    paths, form = _SIZES.unpack_from(document)
    start, end = _SIZES.size + paths, _SIZES.size + paths + form
    listed = json.loads(document[_SIZES.size : start])
    return Said(tuple(tuple(path) for path in listed), document[end:], document[start:end])


def share_out(rank: int, values: StoredValues, said: Sequence[Said], number_of_rank: Sequence[int]) -> Shares:
    """Return what this rank is to store, from what all ranks have said: the distinct things, and the number of each
    rank's. `said` is empty where all say the same.

    Raises `ReplicaMismatchError`, the same on all ranks, naming keys and ranks, where ranks that have something have
    not the same of it; `SaveFailedError` where a message is damaged.
    """
    if not said:
        known, names = frozenset(values.paths), _names([values.form])
        if rank == 0:
            owners, forms = dict.fromkeys(known, 0), (values.form,)
            of_rank = (0,) * len(number_of_rank)
            return Shares(
                rank, values.form, values.paths, known=known, owners=owners, forms=forms, form_of_rank=of_rank
            )
        return Shares(rank, values.form, values.paths, known, names, (values.form,), known)
    ranks_of: list[list[int]] = [[] for _ in said]
    for one, number in enumerate(number_of_rank):
        ranks_of[number].append(one)
    form_numbers: dict[bytes, int] = {}
    form_of = [form_numbers.setdefault(one.form, len(form_numbers)) for one in said]
    form_of_rank = tuple(form_of[number] for number in number_of_rank)
    decoded = [(form_of_rank.index(number), decode_form(form)) for form, number in form_numbers.items()]
    check_forms(decoded)
    first_names = _first_names([form for _, form in decoded])
    compare_values(
        [
            (ranks, renamed_groups(one.paths, first_names), one.digests)
            for ranks, one in zip(ranks_of, said, strict=True)
        ]
    )
    owners = {}
    for number, thing in enumerate(said):  # in the order of the lowest rank of each
        for path in renamed_groups(thing.paths, first_names):
            owners.setdefault(path, ranks_of[number][0])
    lower = tuple(form for first, form in decoded if first < rank)
    shares = Shares(
        rank,
        values.form,
        values.paths,
        frozenset(path for path, owner in owners.items() if owner < rank),
        _names(lower),
        lower,
        frozenset(values.paths),
        first_names,
        owners,
        tuple(form for _, form in decoded) if rank == 0 else (),
        form_of_rank if rank == 0 else (),
        tuple(frozenset(form.aliases) for _, form in decoded),
    )
    shares.stores = True  # what that is, if anything, is seen by doing it
    shares.stores = bool(shares.stored(values).document)
    return shares


def owners_of(shares: Shares, paths_of: Sequence[tuple[int, Sequence[Path], frozenset[Path]]]) -> set[int]:
    """Return the ranks besides 0 that have begun to store values since the exchange, from what each rank has now.

    Takes rank, paths and which of them it stores though nobody knew of them, by rank. Raises `SaveFailedError` where
    a value is stored by none, since the rank that stored it has it no more.
    """
    seen: set[Path] = set()
    found: set[int] = set()
    for rank, paths, fresh in paths_of:
        for path in paths:
            if path in seen:
                continue
            seen.add(path)
            if rank in (0, shares.owners.get(path)):
                continue
            if path not in fresh:
                raise SaveFailedError(
                    f"{said_as(path)}: {name_ranks([shares.owners.get(path, 0)])} had it before and stored it, and has "
                    f"it no more; rank {rank} still has it. The save was not committed: save again"
                )
            found.add(rank)
    return found


def renamed_groups(paths: tuple[Path, ...], first_names: Mapping[Path, Mapping[str, str]]) -> tuple[Path, ...]:
    """Return paths with those of groups under the names by which ranks compare them."""
    if not first_names:
        return paths
    result = []
    for path in paths:
        names = first_names.get(path[:-1])
        name = None if names is None else group_name(path)
        result.append(path if names is None or name is None else group_path(path[:-1], 0, [names.get(name, name)]))
    return tuple(result)


def _names(forms: Sequence[SharedForm]) -> dict[Path, frozenset[str]]:
    found: dict[Path, set[str]] = {}
    for form in forms:
        for path, groups in form.groups.items():
            found.setdefault(path, set()).update(name for group in groups for name in group)
    return {path: frozenset(names) for path, names in found.items()}


def _first_names(forms: Sequence[SharedForm]) -> dict[Path, dict[str, str]]:
    """Return for each parameter the first name of all groups that it ties together, where that is not its group's."""
    result: dict[Path, dict[str, str]] = {}
    for path in {path for form in forms for path in form.groups}:
        groups = {tuple(sorted(group)) for form in forms for group in form.groups.get(path, ()) if group}
        names = [name for group in groups for name in group]
        if len(names) == len(set(names)):
            continue  # no two have a parameter in common
        first = {name: name for name in names}

        def root(name: str, first: dict[str, str] = first) -> str:
            while first[name] != name:
                first[name] = name = first[first[name]]
            return name

        for group in groups:
            for name in group[1:]:
                one, other = sorted((root(group[0]), root(name)))
                first[other] = one
        result[path] = {name: root(name) for name in names if root(name) != name}
    return result
