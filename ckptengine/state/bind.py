"""From a checkpoint's leaves to a state's: what is read into which memory, and what is set afterwards."""

from __future__ import annotations

import copy
import functools
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointError, LoadMismatchError, StateError
from ckptengine.state.adapters import Adapter, TensorView, adapters, describe_type
from ckptengine.state.arrays import NumpyAdapter
from ckptengine.state.binding import Action, Binding, Read
from ckptengine.state.dtypes import DTYPES
from ckptengine.state.kinds import Inspector, Kind, children, optimizer_names
from ckptengine.state.leaf import ArrayLeaf, Part, Path, dotted
from ckptengine.state.loaders import is_stateful_loader, loader_mismatch
from ckptengine.state.nested import item_of, per_rank_items, put_at, replace_contents, sorted_like
from ckptengine.state.per_rank import PerRank
from ckptengine.state.report import LoadReport
from ckptengine.state.saved import Node, Saved, SavedArray, SavedLeaf, SavedValue, own_tree, shared_tree
from ckptengine.state.select import Selection, renamer
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.tree import sharded_parts
from ckptengine.state.values import digest, encode

__all__ = ["Binding", "LoadReport", "Read", "Saved", "SavedLeaf", "bind"]

Put = Callable[[Any], None]
# The order in which `finish` acts: each may use what those before have set.
_CONVERT, _SET, _FRAMEWORK, _OBJECTS = range(4)
_BITS_ONLY = frozenset({"complex32", "float4_e2m1fn_x2"})  # numpy has no arithmetic for these


def bind(
    state: Mapping[str, Any],
    saved: Saved,
    rank: int,
    world_size: int,
    *,
    only: Iterable[str] | None = None,
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> Binding:
    """Return what to read and to set so that the state becomes what was saved.

    `only` are dotted prefixes of the state, `rename` leads from prefixes of the checkpoint to those of the
    state, `cast` allows leaves to change their dtype. Raises `LoadMismatchError` listing every leaf that does
    not fit; with `strict=False` these are left as they are and reported. Raises `StateError` where the state
    can't be filled.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"the state is {describe_type(state)}; pass a dict such as {{'model': model}}")
    binder = _Binder(state, saved, rank, world_size, Selection(only), rename, cast)
    report = binder.report()
    if strict and not report.complete:
        raise LoadMismatchError(
            "the checkpoint and the state don't fit\n"
            + "\n".join(report.problem_lines())
            + "\n(`strict=False` loads what fits; `rename` maps names, `cast=True` allows other dtypes)"
        )
    return Binding(binder.reads, report, binder.actions)


class _Binder:
    """One walk over a state that is to be filled."""

    def __init__(
        self,
        state: Mapping[str, Any],
        saved: Saved,
        rank: int,
        world_size: int,
        selection: Selection,
        rename: Mapping[str, str] | None,
        cast: bool,
    ) -> None:
        self.reads: list[Read] = []
        self.actions: list[Action] = []
        self._saved, self._rank, self._world_size = saved, rank, world_size
        self._resized = world_size != saved.world_size
        self._selection, self._may_cast = selection, cast
        self._rename = renamer(rename, state)
        self._shared = shared_tree(saved, self._rename)
        self._own = own_tree(saved, 0 if self._resized else rank, self._rename)
        self._saved_shapes = {
            dotted(path): node.entry.leaf.shape
            for path, node in self._shared.leaves()
            if isinstance(node.entry, SavedArray)
        }
        self._inspector = Inspector()
        self._names = self._inspector.parameter_names(state)
        self._loaded: list[str] = []
        self._missing: list[tuple[str, Hashable | None]] = []
        self._mismatched: list[str] = []
        self._cast: list[str] = []
        self._filled: set[Hashable] = set()
        self._bind_items(state, (), self._shared, per_rank=False)
        selection.check()

    def report(self) -> LoadReport:
        """Return what fits and what doesn't."""
        unexpected = [
            dotted(path)
            for root in (self._shared, self._own)
            for path, node in root.leaves()
            if not node.used and self._selection.holds(path)
        ]
        # A tied tensor that is missing under its first name is none once another of its names has filled it.
        missing = tuple(name for name, identity in self._missing if identity is None or identity not in self._filled)
        return LoadReport(tuple(self._loaded), missing, tuple(unexpected), tuple(self._mismatched), tuple(self._cast))

    # What doesn't fit.

    def _mismatch(self, path: Path, reason: str, node: Node | None) -> None:
        self._mismatched.append(f"{dotted(path)}: {reason}")
        if node is not None:
            node.use()

    def _absent(self, path: Path, per_rank: bool, identity: Hashable | None = None) -> None:
        own = None if per_rank else self._own.find(path)
        if own is not None:
            self._mismatch(path, "each rank has its own in the checkpoint; wrap it in ce.PerRank", own)
        else:
            self._missing.append((dotted(path), identity))

    # The walk.

    def _bind(self, value: Any, put: Put | None, path: Path, node: Node | None, *, per_rank: bool) -> None:
        kind, adapter = self._inspector.kind(value, path)
        if kind is Kind.PER_RANK:
            self._bind_per_rank(value, path, node)
        elif kind in (Kind.TENSOR, Kind.SHARDED):
            assert adapter is not None
            self._bind_tensor(value, adapter, path, node, per_rank)
        elif kind is Kind.MODULE:
            assert adapter is not None
            self._bind_module(value, adapter, path, node, per_rank)
        elif kind is Kind.OPTIMIZER:
            assert adapter is not None
            self._bind_optimizer(value, adapter, path, node, per_rank)
        elif kind is Kind.OBJECT and is_stateful_loader(value):
            self._bind_loader(value, path, node if per_rank else self._own.find(path))
        elif kind is Kind.OBJECT:
            self._bind_object(value, path, node, per_rank)
        elif kind is Kind.PLAIN:
            self._bind_plain(value, put, path, node, per_rank)
        elif node is not None and node.entry is not None and self._selection.holds(path):
            self._bind_emptied(value, path, node)
        else:
            self._bind_items(value, path, node, per_rank=per_rank)

    def _bind_items(self, value: Any, path: Path, node: Node | None, *, per_rank: bool) -> None:
        for key, item in children(value, path):
            settable = isinstance(value, (MutableMapping, list))
            put = functools.partial(operator.setitem, value, key) if settable else None
            child = None if node is None else node.child(key)
            self._bind(item, put, (*path, key), child, per_rank=per_rank)

    def _bind_emptied(self, value: Any, path: Path, node: Node) -> None:
        """What is walked in the state and one value in the checkpoint: fits where both are plain dicts."""
        plain = isinstance(value, dict) and all(
            self._inspector.kind(item, (*path, key))[0] is Kind.PLAIN for key, item in children(value, path)
        )
        if plain and isinstance(node.entry, SavedValue) and node.entry.value == {}:
            node.use()
            self._loaded.append(dotted(path))
            self._act(_SET, value.clear)
        else:
            here = describe_type(value)
            self._mismatch(path, f"{here} of several leaves here, {node.description} in the checkpoint", node)

    def _act(self, phase: int, action: Callable[[], Any]) -> None:
        self.actions.append((phase, action))

    # Tensors.

    def _bind_tensor(self, tensor: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        if not self._selection.holds(path):
            return
        view = _target_view(tensor, adapter, path)
        if node is None:
            self._absent(path, per_rank, view.identity)
        elif not isinstance(node.entry, SavedArray):
            self._mismatch(path, f"a tensor here, {node.description} in the checkpoint", node)
        elif view.identity is not None and view.identity in self._filled:
            node.use()  # tied: one of its names has brought the bytes
            self._loaded.append(dotted(path))
        elif reason := self._differs(view, node.entry.leaf):
            self._mismatch(path, reason, node)
        else:
            node.use()
            self._loaded.append(dotted(path))
            if view.identity is not None:
                self._filled.add(view.identity)
            self._read(tensor, adapter, view, node.entry, path)

    def _differs(self, view: TensorView, leaf: SavedLeaf) -> str | None:
        if view.shape != leaf.shape:
            return f"shape {view.shape} here, {leaf.shape} in the checkpoint"
        if view.dtype == leaf.dtype:
            return None
        reason = f"dtype {view.dtype} here, {leaf.dtype} in the checkpoint"
        if not self._may_cast:
            return reason
        to_real = leaf.dtype.startswith("complex") and not view.dtype.startswith("complex")
        impossible = to_real or not _BITS_ONLY.isdisjoint({view.dtype, leaf.dtype})
        return f"{reason}, which `cast` can't convert" if impossible else None

    def _read(self, tensor: Any, adapter: Adapter, view: TensorView, entry: SavedArray, path: Path) -> None:
        parts = view.parts
        if view.dtype != entry.leaf.dtype:
            self._cast.append(dotted(path))
            buffers = [np.empty(part.box.shape, DTYPES[entry.leaf.dtype].numpy) for part in parts]
            memories = [_host_parts(buffer, path)[0].memory for buffer in buffers]
            parts = tuple(Part(part.box, memory) for part, memory in zip(parts, memories, strict=True))
            target = tensor.local if isinstance(tensor, ShardedArray) else tensor
            self._act(_CONVERT, functools.partial(adapter.convert, target, buffers, entry.leaf.dtype))
        leaf = ArrayLeaf(path, entry.leaf.dtype, view.shape, view.placement, parts, adapter.name)
        self.reads.append(Read(entry.path, entry.rank, leaf))

    def _fresh(self, entry: SavedArray, path: Path) -> Any:
        """Return a new array of the framework that the leaf came from, numpy's where that isn't imported."""
        known = {adapter.name: adapter for adapter in adapters()}
        adapter = known.get(entry.leaf.container, known["numpy"])
        array = adapter.empty(entry.leaf.dtype, entry.leaf.shape)
        self._read(array, adapter, adapter.view(array, path, target=True), entry, path)
        return array

    # Plain values, and what is built anew from the checkpoint.

    def _bind_plain(self, value: Any, put: Put | None, path: Path, node: Node | None, per_rank: bool) -> None:
        if not self._selection.holds(path):
            self._selection.refuse_part(path)
            return
        if node is None:
            self._absent(path, per_rank)
            return
        placeholder = value is None or (isinstance(value, (dict, list, tuple)) and not value)
        if node.holds_arrays and not placeholder:
            self._mismatch(path, f"{describe_type(value)} here, {node.description} in the checkpoint", node)
            return
        new = self._rebuild(node, path)
        self._loaded.append(dotted(path))
        if type(value) is type(new) and type(value) in (dict, list, Counter, OrderedDict):
            self._act(_SET, functools.partial(replace_contents, value, new))
        elif put is not None:
            self._act(_SET, functools.partial(put, new))
        elif node.holds_arrays or digest(encode(value, path)) != digest(encode(new, path)):
            raise StateError(
                f"{dotted(path)}: the {describe_type(value)} lies in a tuple or another container that can't "
                "be changed, so it can't be loaded; use a list or a dict"
            )

    def _rebuild(self, node: Node, path: Path, like: Any = None) -> Any:
        """Return what was saved here, with new arrays or fitting ones of `like`, to be filled by `reads`."""
        if isinstance(node.entry, SavedValue):
            node.used = True
            return copy.deepcopy(node.entry.value)
        if isinstance(node.entry, SavedArray):
            node.used = True
            return self._rebuild_array(node.entry, path, like)
        result: dict[Any, Any] = {}
        for key in sorted_like(node.children, like):
            result[key] = self._rebuild(node.children[key], (*path, key), item_of(like, key))
        if node.container is not None and set(result) == set(range(len(result))):
            items = [result[index] for index in range(len(result))]
            return tuple(items) if node.container == "tuple" else items
        return result

    def _rebuild_array(self, entry: SavedArray, path: Path, like: Any) -> Any:
        kind, adapter = (Kind.PLAIN, None) if like is None else self._inspector.kind(like, path)
        if adapter is not None and kind in (Kind.TENSOR, Kind.SHARDED):
            try:
                view = _target_view(like, adapter, path)
            except StateError:  # it can be saved, but not filled: a read-only or expanded tensor
                return self._fresh(entry, path)
            if (view.shape, view.dtype) == (entry.leaf.shape, entry.leaf.dtype):
                self._read(like, adapter, view, entry, path)
                return like
        return self._fresh(entry, path)

    # Objects.

    def _bind_object(self, target: Any, path: Path, node: Node | None, per_rank: bool) -> None:
        if not self._selection.holds(path):
            self._selection.refuse_part(path)
            return
        current = target.state_dict()
        inner = [] if per_rank else list(per_rank_items(current, ()))
        if node is None and not (inner and self._own.find(path)):
            self._absent(path, per_rank)
            return
        rebuilt: Any = {} if node is None else self._rebuild(node, path, current)
        self._loaded.append(dotted(path))
        for keys, holder in inner:
            self._bind_per_rank(holder, (*path, *keys), None if node is None else node.find(keys))
            self._act(_SET, functools.partial(put_at, rebuilt, keys, holder))
        self._act(_OBJECTS, functools.partial(_hand_over, target, rebuilt, path))

    def _bind_loader(self, loader: Any, path: Path, own: Node | None) -> None:
        """As an object in a PerRank; but its state is not asked for, which would start its workers."""
        if not self._selection.holds(path):
            self._selection.refuse_part(path)
        elif own is None:
            self._absent(path, per_rank=True)
        elif reason := loader_mismatch(loader, own, self._saved.world_size, self._world_size):
            self._mismatch(path, reason, own)
        else:
            rebuilt = self._rebuild(own, path)
            self._loaded.append(dotted(path))
            self._act(_OBJECTS, functools.partial(loader.load_state_dict, rebuilt))

    def _bind_per_rank(self, target: PerRank, path: Path, shared: Node | None) -> None:
        own = self._own.find(path)
        put = functools.partial(setattr, target, "value")
        if own is None:
            self._bind(target.value, put, path, shared, per_rank=True)
        elif not self._resized and target.ranks is None:
            self._bind(target.value, put, path, own, per_rank=True)
        elif self._selection.holds(path):
            self._resize(target, path, own)

    def _resize(self, target: PerRank, path: Path, own: Node) -> None:
        saved_size = self._saved.world_size
        kind, adapter = self._inspector.kind(target.value, path)
        if target.resize is None or kind is Kind.OPTIMIZER:
            hint = "an optimizer can't be resized"
            if target.resize is None:
                hint = "pass PerRank(value, resize=...) to say what becomes of it"
            reason = f"saved per rank by {saved_size} ranks, loaded by {self._world_size}"
            self._mismatch(path, f"{reason}; {hint}", own)
            return
        own.use()
        mine = 0 if self._resized else self._rank
        ranks = range(saved_size)
        wanted = ranks if target.ranks is None else target.ranks(saved_size, self._rank, self._world_size)
        values = []
        for rank in wanted:
            if rank not in ranks:
                raise ValueError(f"{dotted(path)}: PerRank's `ranks` asks for rank {rank} of {saved_size} that saved")
            node = own if rank == mine else own_tree(self._saved, rank, self._rename).find(path)
            values.append(None if node is None else self._rebuild(node, path))
        self._loaded.append(dotted(path))
        self._act(_SET, functools.partial(self._set_resized, target, values, kind, adapter, path))

    def _set_resized(self, target: PerRank, values: list[Any], kind: Kind, adapter: Adapter | None, path: Path) -> None:
        assert target.resize is not None
        new = target.resize(values, self._rank, self._world_size)
        if kind is Kind.MODULE and adapter is not None:
            keys = {entry.name: entry.key for entry in self._inspector.entries(target.value, adapter, path)}
            adapter.load_module(target.value, {keys[name]: item for name, item in new.items()})
        elif kind is Kind.OBJECT:
            target.value.load_state_dict(new)
        elif type(target.value) is type(new) and isinstance(new, (dict, list)):
            replace_contents(target.value, new)
        else:
            target.value = new

    # Modules and optimizers.

    def _bind_module(self, module: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        handed: dict[str, Any] = {}
        for entry in self._inspector.entries(module, adapter, path):
            where = (*path, entry.name)
            child = None if node is None else node.child(entry.name)
            if entry.live:
                self._bind_tensor(entry.value, adapter, where, child, per_rank)
            elif self._selection.holds(where):
                if child is None:
                    self._absent(where, per_rank)
                    continue
                handed[entry.key] = self._rebuild(child, where, entry.value)
                self._loaded.append(dotted(where))
        if handed:
            self._act(_FRAMEWORK, functools.partial(adapter.load_module, module, handed))

    def _bind_optimizer(self, optimizer: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        adapter.check_optimizer(optimizer, path)
        groups = adapter.optimizer_groups(optimizer)
        names = optimizer_names(groups, self._names)
        if node is None:
            if self._selection.reaches(path):
                self._absent(path, per_rank)
            return
        saved_state = node.child("state") or Node()
        by_name = {self._parameter_name(str(key)): child for key, child in saved_state.children.items()}
        for group, group_names in zip(groups, names, strict=True):
            for parameter, name in zip(group["params"], group_names, strict=True):
                where = (*path, "state", name)
                current = adapter.optimizer_state(optimizer, parameter)
                child = by_name.get(name)
                if not (child or current) or not self._selection.holds(where):
                    continue
                if child is not None and self._state_differs(adapter, parameter, name, where, child):
                    continue
                new: dict[str, Any] | None = None
                if child is not None:
                    new = self._bind_parameter_state(adapter, group, parameter, current, where, child)
                setting = functools.partial(adapter.set_optimizer_state, optimizer, parameter, new)
                self._act(_FRAMEWORK, setting)
        self._bind_groups(adapter, groups, names, (*path, "param_groups"), node.child("param_groups"), per_rank)

    def _parameter_name(self, name: str) -> str:
        """A parameter's name is itself a dotted path, so `rename` holds for it too."""
        renamed = self._rename((name,))
        return name if renamed == (name,) else dotted(renamed)

    def _state_differs(self, adapter: Adapter, parameter: Any, name: str, path: Path, node: Node) -> bool:
        """Whether the saved state belongs to a parameter of another shape: then none of it is taken."""
        here = tuple(parameter.shape)
        saved = self._saved_shapes.get(name, here)
        for key, child in node.children.items():
            if isinstance(child.entry, SavedArray) and not adapter.state_fits(
                parameter, str(key), child.entry.leaf.shape
            ):
                saved = child.entry.leaf.shape
        if saved == here:
            return False
        self._mismatch(path, f"state of a parameter of shape {here} here, {saved} in the checkpoint", node)
        return True

    def _bind_parameter_state(
        self,
        adapter: Adapter,
        group: dict[str, Any],
        parameter: Any,
        current: dict[str, Any],
        path: Path,
        node: Node,
    ) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for key, child in node.children.items():
            where = (*path, key)
            entry = child.entry
            if not isinstance(entry, SavedArray):
                new[str(key)] = self._rebuild(child, where, current.get(str(key)))
                self._loaded.append(dotted(where))
                continue
            tensor = current.get(str(key))
            if tensor is None or not adapter.is_tensor(tensor):
                tensor = adapter.new_state_tensor(group, parameter, str(key), entry.leaf.dtype, entry.leaf.shape)
            new[str(key)] = tensor
            self._bind_tensor(tensor, adapter, where, child, per_rank=entry.rank is not None)
        return new

    def _bind_groups(
        self,
        adapter: Adapter,
        groups: list[dict[str, Any]],
        names: list[list[str]],
        path: Path,
        node: Node | None,
        per_rank: bool,
    ) -> None:
        if not self._selection.holds(path):
            self._selection.refuse_part(path)
            return
        if node is None:
            self._absent(path, per_rank)
            return
        reads, actions, cast = len(self.reads), len(self.actions), len(self._cast)
        saved = self._rebuild(node, path, groups)
        reason = self._groups_differ(saved, names)
        if reason is not None:
            del self.reads[reads:], self.actions[actions:], self._cast[cast:]
            self._mismatch(path, reason, node)
            return
        self._loaded.append(dotted(path))
        for group, new in zip(groups, saved, strict=True):
            for key, value in new.items():
                if key != "params":
                    self._act(_FRAMEWORK, functools.partial(adapter.set_hyperparameter, group, key, value))

    def _groups_differ(self, saved: Any, names: list[list[str]]) -> str | None:
        if not isinstance(saved, list) or not all(isinstance(g, dict) and "params" in g for g in saved):
            return "no parameter groups in the checkpoint"
        if len(saved) != len(names):
            return f"{len(names)} parameter groups here, {len(saved)} in the checkpoint"
        for number, (group, here) in enumerate(zip(saved, names, strict=True)):
            there = {self._parameter_name(str(name)) for name in group["params"]}
            if there != set(here):
                odd = sorted(there.symmetric_difference(here))
                return f"group {number} has other parameters in the checkpoint: {', '.join(odd[:8])}" + (
                    f" and {len(odd) - 8} more" if len(odd) > 8 else ""
                )
        return None


def _hand_over(target: Any, state: Any, path: Path) -> None:
    try:
        target.load_state_dict(state)
    except CheckpointError:
        raise
    except Exception as error:
        raise LoadMismatchError(
            f"{dotted(path)}: load_state_dict of {describe_type(target)} refused what was saved: "
            f"{type(error).__name__}: {error}"
        ) from error


def _target_view(tensor: Any, adapter: Adapter, path: Path) -> TensorView:
    if isinstance(tensor, ShardedArray):
        return sharded_parts(tensor, path, target=True)
    return adapter.view(tensor, path, target=True)


def _host_parts(buffer: np.ndarray[Any, Any], path: Path) -> tuple[Part, ...]:
    # The dtype is one of the format's own, also where numpy only keeps its bits.
    return NumpyAdapter().view(buffer, path, target=True).parts
