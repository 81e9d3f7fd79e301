"""What of a checkpoint is exported: arrays, in the order of the state and under their new names, and plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.load.checkpoint import Opened
from ckptengine.load.describe import describe
from ckptengine.load.loader import check_distinct, refuse_unread
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path, dotted
from ckptengine.state.forms import Form
from ckptengine.state.outline import put_in_order
from ckptengine.state.rename import Rename, renamer
from ckptengine.state.select import Selection
from ckptengine.state.tree import unflatten

__all__ = ["Contents", "Item", "contents_of"]

_FLOATS = frozenset(("float16", "bfloat16", "float32", "float64"))


@dataclass(frozen=True, slots=True)
class Item:
    """An array: its path in the export, its leaf's number in the checkpoint, and the dtype that it is written in.

    With `box` it is that part of the array alone. `shape` is always the whole's.
    """

    path: Path
    leaf: int
    stored: str
    dtype: str
    shape: tuple[int, ...]
    box: Box | None = None

    @property
    def name(self) -> str:
        """The dotted name."""
        return dotted(self.path)

    @property
    def itemsize(self) -> int:
        """Bytes of an element, as written."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, as written."""
        return math.prod(self.shape if self.box is None else self.box.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Contents:
    """What is exported.

    `aliases` are paths that are the same array as that of an item, `modules` and `optimizers` what lies where, as far
    as the checkpoint says. `own` counts the arrays that are left out because each rank has its own.
    """

    items: tuple[Item, ...]
    aliases: Mapping[Path, Path]
    values: Mapping[Path, Any]
    containers: Mapping[Path, Form]
    modules: tuple[Path, ...] = ()
    optimizers: tuple[Path, ...] = ()
    own: int = 0

    def nested(self, array: Callable[[Item], Any]) -> dict[Any, Any]:
        """Return the state as nested dicts and lists, with what `array` makes of each array."""
        made = {item.path: array(item) for item in self.items}
        return unflatten(self.values, made, self.containers, self.aliases)


def contents_of(checkpoint: Opened, only: tuple[str, ...] | None, rename: Rename | None, dtype: str | None) -> Contents:
    """Return what of a checkpoint is exported.

    `only` are dotted prefixes of names in the checkpoint, before `rename`. `dtype` is that of all floating arrays but
    scalars, None: as they are. Raises `LoadMismatchError` for names that clash or name nothing, `StateError` for a
    dtype that is none.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise StateError(f"dtype={dtype!r}: floating arrays can be written as {', '.join(sorted(_FLOATS))}")
    saved = describe(checkpoint)
    selection, renamed = Selection(only), renamer(rename, {}, saved.flat)
    refuse_unread(saved.unread_of(selection, lambda path: path))
    index = checkpoint.rows.index
    sources: dict[Path, Path] = {path: path for path in saved.leaves} | dict(saved.aliases)
    values = {path: value for path, value in saved.values.items() if selection.holds(path)}
    wanted = {path: first for path, first in sources.items() if selection.holds(path)}
    check_distinct([*wanted, *values], renamed)
    unknown = selection.unmatched
    if unknown:
        raise LoadMismatchError(f"only={unknown}: {checkpoint.location} has nothing of that name")
    if not wanted:
        raise LoadMismatchError(f"{checkpoint.location}: nothing that was selected is an array")
    first: dict[Path, Path] = {}
    items: dict[Path, Item] = {}
    aliases: dict[Path, Path] = {}
    for path, source in wanted.items():
        where = renamed(path)
        if first.setdefault(source, where) != where:
            aliases[where] = first[source]
            continue
        leaf = saved.leaves[source]
        # A scalar is a count or a rate: Adam's steps, which bfloat16 can't tell apart from 257 on.
        changes = dtype is not None and leaf.dtype in _FLOATS and leaf.shape != ()
        target = dtype if changes and dtype is not None else leaf.dtype
        items[where] = Item(where, index[source, None], leaf.dtype, target, leaf.shape)
    values = {renamed(path): value for path, value in values.items()}
    containers = {renamed(path): form for path, form in saved.containers.items()}
    nested = unflatten(values, items, {}, {})
    if saved.outline is not None:
        put_in_order(nested, saved.outline, renamed)
    ordered = tuple(one for one in _leaves(nested) if isinstance(one, Item))
    own = sum(map(len, saved.rank_leaves)) if only is None else 0
    built = () if saved.outline is None else saved.outline.containers
    modules, optimizers = (
        tuple(renamed(one.path) for one in built if one.kind == kind) for kind in ("module", "optimizer")
    )
    return Contents(ordered, aliases, values, containers, modules, optimizers, own)


def _leaves(nested: Mapping[Any, Any]) -> Iterator[Any]:
    for item in nested.values():
        if isinstance(item, dict):
            yield from _leaves(item)
        else:
            yield item
