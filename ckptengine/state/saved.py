"""What a checkpoint holds, as a tree in which a state finds its leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckptengine.errors import CheckpointDamagedError, LoadMismatchError
from ckptengine.frameworks.adapter import TensorKind
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.forms import Form
from ckptengine.state.outline import Container, Outline, in_given_order, renamed_key, sorted_keys
from ckptengine.state.select import Selection
from ckptengine.state.values import MAX_DEPTH

__all__ = ["Node", "Saved", "SavedArray", "SavedLeaf", "SavedValue", "own_tree", "shared_tree", "with_places"]


@dataclass(frozen=True, slots=True)
class SavedLeaf:
    """One stored array: logical dtype, global shape, how it was spread, which framework it came from."""

    dtype: str
    shape: tuple[int, ...]
    placement: Placement
    container: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint's leaves. The three sequences have one item for each rank that saved, or none at all.

    They may be lazy: at an equal world size only this rank's items are looked at, at another one only rank
    0's, and all of them where a `PerRank` has `resize`. With `flat` each path is one text with dots, as other libraries
    name tensors: which of its parts are keys is for the state to say. `unread` says what lies at some paths of another
    library's checkpoint that is neither an array nor a plain value. `joined_groups` are the paths of optimizers' groups
    that several ranks had parts of. `rank_items` has, for each rank and each of its objects of
    which other ranks had other items, the paths of the leaves that this rank had, and
    `rank_outside` what `outside_digest` said of a rank that has such objects.
    """

    world_size: int
    leaves: Mapping[Path, SavedLeaf]
    values: Mapping[Path, Any]
    aliases: Mapping[Path, Path]
    containers: Mapping[Path, Form]
    rank_leaves: Sequence[Mapping[Path, SavedLeaf]] = ()
    rank_values: Sequence[Mapping[Path, Any]] = ()
    rank_containers: Sequence[Mapping[Path, Form]] = ()
    outline: Outline | None = None
    rank_outlines: Sequence[Outline | None] = ()
    flat: bool = False
    unread: Mapping[Path, str] = field(default_factory=dict)
    rank_items: Sequence[Mapping[Path, frozenset[Path]]] = ()
    rank_outside: Sequence[str] = ()
    joined_groups: frozenset[Path] = frozenset()

    def unread_of(self, selection: Selection, rename: Callable[[Path], Path]) -> dict[str, str]:
        """Return what is not read of a selection, by its name there."""
        renamed = {rename(path): what for path, what in self.unread.items()}
        return {dotted(path): what for path, what in renamed.items() if selection.holds(path)}


@dataclass(frozen=True, slots=True)
class SavedArray:
    """An array of the checkpoint: its own path there, and its rank where it is a rank's own.

    `order` is how it lay in memory (`memory_order`; None: in C order). `told` says whether the checkpoint knows that.
    `kind` is what it was beside its contents (`Adapter.tensor_kind`), None for a plain tensor and in a module;
    `tells_kind` says whether the checkpoint knows that.
    `spread` is how an array of an optimizer's state was spread, None where in the usual way.
    """

    path: Path
    rank: int | None
    leaf: SavedLeaf
    order: tuple[int, ...] | None = None
    told: bool = False
    spread: str | None = None
    kind: TensorKind = None
    tells_kind: bool = False


@dataclass(frozen=True, slots=True)
class SavedValue:
    """A plain value of the checkpoint."""

    value: Any


class Node:
    """One place in the tree; `used` once the state has taken it, or a message has named it.

    `cls` is the class of the optimizer or object that was here. `ordered` tells that the children are in the order that
    the state had them in, `kind` what held them; None where the checkpoint does not say. `parameter_shape` is that of
    the parameter whose state lies here, `metadata` the `_metadata` of an `OrderedDict`, None where there is none.
    `tells_metadata` tells that the checkpoint knows of it. `number` is that of an entry, the same on all ranks that
    read the checkpoint; `joined` tells that several ranks had parts of the groups that are here.
    """

    __slots__ = (
        "children",
        "cls",
        "container",
        "entry",
        "joined",
        "kind",
        "metadata",
        "number",
        "ordered",
        "parameter_shape",
        "tells_metadata",
        "used",
    )

    def __init__(self) -> None:
        self.children: dict[Key, Node] = {}
        self.entry: SavedArray | SavedValue | None = None
        self.container: Form | None = None
        self.cls: str | None = None
        self.kind: str | None = None
        self.ordered = False
        self.parameter_shape: tuple[int, ...] | None = None
        self.metadata: Any = None
        self.tells_metadata = False
        self.number = -1
        self.joined = False
        self.used = False

    def child(self, key: Key) -> Node | None:
        """Return what lies under a key; keys of another type are other keys."""
        node = self.children.get(key)
        return node

    def find(self, path: Path) -> Node | None:
        """Return what lies under a path."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def leaves(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Yield all nodes with an entry, with their paths."""
        if self.entry is not None:
            yield path, self
        for key, child in self.children.items():
            yield from child.leaves((*path, key))

    def nodes(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Yield this and all nodes below, with their paths."""
        yield path, self
        for key, child in self.children.items():
            yield from child.nodes((*path, key))

    def plain_values(self) -> dict[Path, Any]:
        """Return the plain values from here on, by their paths from here."""
        return {path: node.entry.value for path, node in self.leaves() if isinstance(node.entry, SavedValue)}

    def use(self) -> None:
        """Mark everything from here on as used."""
        for _, node in self.leaves():
            node.used = True

    @property
    def holds_arrays(self) -> bool:
        """Whether an array lies here or below."""
        return any(isinstance(node.entry, SavedArray) for _, node in self.leaves())

    @property
    def description(self) -> str:
        """What lies here, in words."""
        if isinstance(self.entry, SavedArray):
            return f"a tensor of shape {self.entry.leaf.shape}"
        if isinstance(self.entry, SavedValue):
            return f"a plain value ({describe_type(self.entry.value)})"
        return "several leaves"


def shared_tree(saved: Saved, rename: Callable[[Path], Path]) -> Node:
    """Return the tree of what all ranks share, under the state's names."""
    root = Node()
    outline = saved.outline
    orders: Mapping[Path, tuple[int, ...]] = {} if outline is None else outline.orders
    told = outline is not None
    kinds: Mapping[Path, TensorKind] = {} if outline is None else outline.kinds
    tells = outline is not None and outline.tells_kinds
    spreads: Mapping[Path, str] = {} if outline is None else outline.spreads
    arrays = {
        path: SavedArray(path, None, leaf, orders.get(path), told, spreads.get(path), kinds.get(path), tells)
        for path, leaf in saved.leaves.items()
    }
    for path, first in saved.aliases.items():
        if first not in arrays:
            raise CheckpointDamagedError(f"{dotted(path)} is the same tensor as {dotted(first)}, which isn't there")
        arrays.setdefault(path, replace(arrays[first], kind=kinds.get(path)))
    _insert(root, arrays, saved.values, saved.containers, rename)
    _add_empty(root, outline, rename)
    _apply(root, outline, rename)
    for path in saved.joined_groups:
        groups = root.find(rename(path))
        if groups is not None:
            groups.joined = True
    return root


def own_tree(saved: Saved, rank: int, rename: Callable[[Path], Path]) -> Node:
    """Return the tree of what one of the ranks that saved has of its own."""
    root = Node()
    leaves = saved.rank_leaves[rank] if saved.rank_leaves else {}
    values = saved.rank_values[rank] if saved.rank_values else {}
    containers = saved.rank_containers[rank] if saved.rank_containers else {}
    outline = saved.rank_outlines[rank] if saved.rank_outlines else None
    orders: Mapping[Path, tuple[int, ...]] = {} if outline is None else outline.orders
    kinds: Mapping[Path, TensorKind] = {} if outline is None else outline.kinds
    tells = outline is not None and outline.tells_kinds
    told = outline is not None
    _insert(
        root,
        {
            path: SavedArray(path, rank, leaf, orders.get(path), told, None, kinds.get(path), tells)
            for path, leaf in leaves.items()
        },
        values,
        containers,
        rename,
    )
    _add_empty(root, outline, rename)
    _apply(root, outline, rename)
    return root


def _apply(root: Node, outline: Outline | None, rename: Callable[[Path], Path]) -> None:
    """Give the nodes their classes and kinds, and their children in the order that the state had them in."""
    for one in () if outline is None else outline.containers:
        node = root.find(rename(one.path))
        if node is not None:
            _arrange(node, one, outline, rename)
    for where, shape in ({} if outline is None else outline.shapes).items():
        node = root.find(rename(where))
        if node is not None:
            node.parameter_shape = shape
    for where, metadata in ({} if outline is None else outline.metadata).items():
        node = root.find(rename(where))
        if node is not None:
            node.metadata = metadata


def _arrange(node: Node, one: Container, outline: Outline | None, rename: Callable[[Path], Path]) -> None:
    if one.cls:
        node.cls = one.cls
    if one.kind == "object":  # what its state is built like comes next, under the same path
        return
    node.kind = one.kind
    node.tells_metadata = one.kind == "ordered" and outline is not None and outline.tells_metadata
    if one.kind in ("list", "tuple"):
        return
    keys = sorted_keys(node.children) if one.keys is None else [renamed_key(one.path, key, rename) for key in one.keys]
    node.children = in_given_order(node.children, keys)
    node.ordered = True


def with_places(
    saved: Saved, node: Node | None, path: Path, places: Iterable[Path], rename: Callable[[Path], Path]
) -> Node:
    """Return a node with places for what ranks have of their own in it, each in its order among the keys.

    `places` are their paths from here. The node and its containers on the way are copies, what they hold is not.
    """
    root, made = _copied(node), {path}
    for keys in places:
        here = root
        for number, key in enumerate(keys, 1):
            if (where := (*path, *keys[:number])) not in made:
                here.children[key] = _copied(here.child(key))
                made.add(where)
            here = here.children[key]
    outline = saved.outline
    for one in () if outline is None else outline.containers:
        if (where := rename(one.path)) in made and (found := root.find(where[len(path) :])) is not None:
            _arrange(found, one, outline, rename)
    for where, form in saved.containers.items():
        if (renamed := rename(where)) in made and (found := root.find(renamed[len(path) :])) is not None:
            found.container = form
    for where, metadata in ({} if outline is None else outline.metadata).items():
        if (renamed := rename(where)) in made and (found := root.find(renamed[len(path) :])) is not None:
            found.metadata = metadata
    return root


def _copied(node: Node | None) -> Node:
    if node is None:
        return Node()
    new = copy.copy(node)
    new.children = dict(node.children)
    return new


def _add_empty(root: Node, outline: Outline | None, rename: Callable[[Path], Path]) -> None:
    """Make nodes without anything inside for the states of an optimizer's parameters that were empty."""
    for path in () if outline is None or outline.empty is None else outline.empty:
        node, renamed = root, rename(path)
        if len(renamed) > MAX_DEPTH:
            raise CheckpointDamagedError(f"a path has {len(renamed)} keys; up to {MAX_DEPTH} are possible")
        for key in renamed:
            node = node.children.setdefault(key, Node())
            if node.entry is not None:
                raise CheckpointDamagedError(f"{dotted(renamed)!r}, an empty state, lies in the leaf {key!r}")


def _insert(
    root: Node,
    arrays: Mapping[Path, SavedArray],
    values: Mapping[Path, Any],
    containers: Mapping[Path, Form],
    rename: Callable[[Path], Path],
) -> None:
    entries: list[tuple[Path, SavedArray | SavedValue]] = [*arrays.items()]
    entries += [(path, SavedValue(value)) for path, value in values.items()]
    for number, (path, entry) in enumerate(entries):
        if not 0 < len(path) <= MAX_DEPTH:
            raise CheckpointDamagedError(f"a leaf's path has {len(path)} keys; from 1 to {MAX_DEPTH} are possible")
        renamed = rename(path)
        node = _make(root, renamed)
        if node.entry is not None:
            raise LoadMismatchError(
                f"two leaves of the checkpoint are called {dotted(renamed)!r} (one is {dotted(path)!r}); "
                "change `rename`"
            )
        node.entry, node.number = entry, number
    for path, node in root.leaves():
        if node.children:
            raise LoadMismatchError(f"the leaf {dotted(path)!r} of the checkpoint has other leaves inside it")
    for path, kind in containers.items():
        node_at = root.find(rename(path))
        if node_at is not None:
            node_at.container = kind


def _make(root: Node, path: Path) -> Node:
    node = root
    for key in path:
        node = node.children.setdefault(key, Node())
    return node
