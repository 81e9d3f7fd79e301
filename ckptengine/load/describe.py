"""What a checkpoint holds, in the words of the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

from ckptengine.errors import CheckpointDamagedError
from ckptengine.foreign.checkpoint import ForeignCheckpoint
from ckptengine.load.checkpoint import Checkpoint, Opened
from ckptengine.schema.path import Path, dotted
from ckptengine.state.forms import Form, is_form
from ckptengine.state.outline import Outline, decode_outline
from ckptengine.state.saved import Saved, SavedLeaf
from ckptengine.state.union import NAMED, join_groups, join_outlines, joined_names
from ckptengine.state.values import decode, encode

__all__ = ["describe"]

_T = TypeVar("_T")
_TABLES = ("values", "aliases", "containers")


def describe(checkpoint: Opened) -> Saved:
    """Return the leaves and values of a checkpoint; what belongs to single ranks is read when it is looked at.

    Raises `CheckpointDamagedError` where the stored tables are not what this format has.
    """
    if isinstance(checkpoint, ForeignCheckpoint):
        return checkpoint.saved
    world_size = checkpoint.manifest.world_size
    shared: dict[Path, SavedLeaf] = {}
    own: list[dict[Path, SavedLeaf]] = [{} for _ in range(world_size)]
    for record in checkpoint.rows.leaves:
        leaf = SavedLeaf(record.dtype, record.shape, record.placement, record.container)
        if record.rank is None:
            shared[record.path] = leaf
        elif record.rank < world_size:
            own[record.rank][record.path] = leaf
    where = checkpoint.archive(0).location
    values = _values(checkpoint.shared, where)
    aliases, containers = _aliases(checkpoint.shared, shared, where), _containers(checkpoint.shared, where)
    outline = _outline(checkpoint.shared, len(shared) + len(values), where)
    joined: set[Path] = set()
    others = [(checkpoint.shared_of(rank), _file(checkpoint, rank)) for rank in checkpoint.manifest.value_ranks]
    for stored, file in others:
        values = _added(values, _values(stored, file))
        aliases = _added(aliases, _aliases(stored, shared, file))
        containers = _added(containers, _containers(stored, file))
        joined |= _join_groups(values, stored, file)
    if outline is not None and others:
        outline = _joined(outline, others, len(shared) + len(values), where)
    return Saved(
        world_size=world_size,
        leaves=shared,
        values=values,
        aliases={path: first for path, first in aliases.items() if path not in shared},
        containers=containers,
        rank_leaves=own,
        rank_values=_Lazy(world_size, lambda rank: _values(checkpoint.own(rank), _file(checkpoint, rank))),
        rank_containers=_Lazy(world_size, lambda rank: _containers(checkpoint.own(rank), _file(checkpoint, rank))),
        outline=outline,
        rank_outlines=_Lazy(
            world_size,
            lambda rank: _outline(checkpoint.own(rank), len(own[rank]), _file(checkpoint, rank)),
        ),
        rank_items=_Lazy(world_size, lambda rank: _items(checkpoint.own(rank), _file(checkpoint, rank))),
        rank_outside=_Lazy(world_size, lambda rank: str(checkpoint.own(rank).get("outside", ""))),
        joined_groups=frozenset(joined),
    )


class _Lazy(Sequence[_T]):
    """A sequence whose items are made when they are looked at, each once."""

    def __init__(self, length: int, make: Callable[[int], _T]) -> None:
        self._length, self._make = length, make
        self._items: dict[int, _T] = {}

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        if index not in self._items:
            self._items[index] = self._make(index)
        return self._items[index]


def _file(checkpoint: Checkpoint, rank: int) -> str:
    return checkpoint.archive(rank).location


def _values(stored: Mapping[str, Any], where: str) -> dict[Path, Any]:
    result = {}
    for path, value in _pairs(stored, "values", where):
        try:
            result[path] = decode(value)
        except CheckpointDamagedError as error:
            raise CheckpointDamagedError(f"{where}: {dotted(path)}: {error}") from None
    return result


def _aliases(stored: Mapping[str, Any], leaves: Mapping[Path, SavedLeaf], where: str) -> dict[Path, Path]:
    result = {path: _path(target, where) for path, target in _pairs(stored, "aliases", where)}
    for path, target in result.items():
        if target not in leaves:
            raise CheckpointDamagedError(
                f"{where}: {dotted(path)} is said to be the same array as {dotted(target)}, which is not there"
            )
    return result


def _containers(stored: Mapping[str, Any], where: str) -> dict[Path, Form]:
    return {path: form for path, form in _pairs(stored, "containers", where) if is_form(form)}


def _items(stored: Mapping[str, Any], where: str) -> dict[Path, frozenset[Path]]:
    result = {}
    for path, items in _pairs(stored, "items", where):
        if not isinstance(items, list):
            raise CheckpointDamagedError(f"{where}: the items of {dotted(path)} are no list")
        result[path] = frozenset((*path, *_path(keys, where)) for keys in items)
    return result


def _outline(stored: Mapping[str, Any], leaves: int, where: str) -> Outline | None:
    """Return how the state was built; None where the checkpoint is of a version that did not say so."""
    if "structure" not in stored:
        return None
    try:
        return decode_outline(stored["structure"], leaves + sum(map(len, filter(None, map(stored.get, _TABLES)))))
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{where}: {error}") from None


def _added(known: dict[Path, _T], new: Mapping[Path, _T]) -> dict[Path, _T]:
    return known | {path: item for path, item in new.items() if path not in known}


def _joined(outline: Outline, others: Sequence[tuple[Mapping[str, Any], str]], leaves: int, where: str) -> Outline:
    """Return an outline with what other ranks have added to it."""
    found = [outline, *(_outline(stored, leaves, file) for stored, file in others)]
    try:
        return join_outlines([one for one in found if one is not None])
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{where}: {error}") from None


def _join_groups(values: dict[Path, Any], stored: Mapping[str, Any], where: str) -> set[Path]:
    """Add an optimizer's groups, or parameters to each of them, to what lower ranks have stored, in place.

    Returns the paths of the lists that groups are in.
    """
    found = set()
    for path, groups in _pairs(stored, "groups", where):
        try:
            new = decode(groups)
            if isinstance(new, dict):
                known = values.get((*path, "params"), [])
                mine = {name: values.get((*path, name), []) for name in NAMED if name in new}
                joined = joined_names(mine, new, frozenset(known))
                values.update({(*path, name): names for name, names in joined.items()})
                found.add(path[:-1])
                continue
            known = values.get(path, [])
            values[path] = [decode(g) for g in join_groups([encode(g, path) for g in known], groups)] if known else new
            found.add(path)
        except (CheckpointDamagedError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointDamagedError(f"{where}: {dotted(path)}: no groups of an optimizer ({error})") from None
    return found


def _pairs(stored: Mapping[str, Any], name: str, where: str) -> list[tuple[Path, Any]]:
    items = stored.get(name, [])
    if not isinstance(items, list) or not all(isinstance(item, list) and len(item) == 2 for item in items):
        raise CheckpointDamagedError(f"{where}: the table of {name} is not a list of pairs")
    return [(_path(path, where), value) for path, value in items]


def _path(value: Any, where: str) -> Path:
    if not isinstance(value, list) or not all(type(key) in (str, int) for key in value):
        raise CheckpointDamagedError(f"{where}: {value!r:.80} is not the path of a leaf")
    return tuple(value)
