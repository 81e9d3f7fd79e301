"""How tensors and plain values are bound, and how what is built anew is built."""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.frameworks.adapter import ABOUT, Adapter, Layouts, TensorView
from ckptengine.frameworks.numpy import NumpyAdapter
from ckptengine.frameworks.registry import adapter_of_tensor, adapters
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, Part, Placement
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.bind.base import BinderBase, Put
from ckptengine.state.bind.live import is_optimizer_state, live_tensors
from ckptengine.state.bind.room import room_for
from ckptengine.state.bind.work import SET
from ckptengine.state.binding import Read
from ckptengine.state.classes import unknown_member
from ckptengine.state.cut import convert_cut
from ckptengine.state.extents import extents
from ckptengine.state.forms import rebuild
from ckptengine.state.kinds import SCALARS, Kind
from ckptengine.state.nested import item_of, replace_contents, sorted_like
from ckptengine.state.outline import in_order
from ckptengine.state.per_rank import PerRank
from ckptengine.state.saved import Node, SavedArray, SavedValue
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.tree import sharded_parts
from ckptengine.state.values import digest, encode

__all__ = ["Maker", "TensorBinder", "of_kind"]


@dataclass(frozen=True, slots=True)
class Maker:
    """How new arrays are made: `array` makes one for what was saved, at its path in the state, and has it read;
    `parameter` is what they belong to, None where nothing is known of that."""

    array: Callable[[SavedArray, Path], Any]
    parameter: Any


_BITS_ONLY = frozenset({"complex32", "float4_e2m1fn_x2"})  # numpy has no arithmetic for these


class TensorBinder(BinderBase):
    """Binds the leaves: tensors, and plain values."""

    def _bind_tensor(self, tensor: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        if not self._selection.holds(path):
            return
        if adapter.is_wrapped(tensor):
            self._bind_wrapped(tensor, adapter, path, node, per_rank)
            return
        if self._inspector.declared.is_own(tensor) and not per_rank:
            node, per_rank = self._own_of(path, node), True
            if node is None and self._source.own.find(path) is not None:
                return
        view = self._view_to_fill(tensor, adapter, path, node)
        if node is None:
            self._found.lacks_arrays = True
            self._absent(path, per_rank, view.identity)
        elif not isinstance(node.entry, SavedArray):
            self._mismatch(path, f"a tensor here, {node.description} in the checkpoint", node)
        elif self._is_filled(view, node.entry):
            node.use()  # tied: one of its names has brought the bytes
            self._found.loaded.append(dotted(path))
            if view.dtype != node.entry.leaf.dtype:
                self._found.cast.append(path)
        elif reason := self._differs(view, node.entry, tensor):
            self._found.lacks_arrays = True
            self._mismatch(path, reason, node)
        else:
            node.use()
            self._found.loaded.append(dotted(path))
            number = len(self._work.reads)
            self._read(tensor, adapter, view, node.entry, path)
            if view.identity is not None and (first := self._work.filled.setdefault(view.identity, number)) != number:
                self._work.ties.append((first, number))  # whether both bring the same is seen before anything is read

    def _view_to_fill(self, tensor: Any, adapter: Adapter, path: Path, node: Node | None) -> TensorView:
        """Return a tensor's view; without parts where it has no memory and nothing fits it."""
        dtype = None if isinstance(tensor, ShardedArray) else adapter.dtype_without_memory(tensor)
        if dtype is not None:
            view = TensorView(dtype, self._inspector.declared.shape_of(tensor), Placement.REPLICATED, (), None)
            entry = None if node is None else node.entry
            if not isinstance(entry, SavedArray) or self._differs(view, entry, tensor) is not None:
                self._found.without_memory.add(path)
                return view
        return self._target_view(tensor, adapter, path)

    def _is_filled(self, view: TensorView, entry: SavedArray) -> bool:
        """Whether the very same array of the checkpoint is read into a memory under another name."""
        if view.identity is None or view.identity not in self._work.filled:
            return False
        read = self._work.reads[self._work.filled[view.identity]]
        return (read.path, read.rank) == (entry.path, entry.rank)

    def _bind_wrapped(self, tensor: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        """Bind what a tensor subclass is made of, where the checkpoint has one that is made in the same way."""
        if node is None:
            self._absent(path, per_rank)
            return
        saved, kind = _about(node), describe_type(tensor)
        if saved is None:
            self._mismatch(path, f"a {kind} here, {node.description} in the checkpoint", node)
            return
        inner = adapter.unwrap(tensor, path)
        here, where = inner.pop(ABOUT), (*path, ABOUT)
        if digest(encode(here, where)) != digest(encode(saved, where)):
            odd = [f"{key} {here.get(key)} here, {saved.get(key)} in the checkpoint" for key in here]
            different = [line for key, line in zip(here, odd, strict=True) if here[key] != saved.get(key)]
            self._mismatch(path, f"a {kind}: {'; '.join(different)}", node)
            return
        node.children[ABOUT].used = True
        self._found.loaded.append(dotted(where))
        for name, item in inner.items():
            self._bind_tensor(item, adapter, (*path, name), node.child(name), per_rank)

    def _rebuild_wrapped(self, node: Node, about: Any, path: Path, like: Any, make: Maker) -> Any:
        """Return a tensor subclass, `like` where it is made in the same way, else a new one, to be read into.

        Where the framework isn't imported, return the inner tensors as a dict.
        """
        children = {str(key): child.entry for key, child in node.children.items()}
        arrays = {key: entry.leaf for key, entry in children.items() if isinstance(entry, SavedArray)}
        known = {adapter.name: adapter for adapter in adapters()}
        adapter = next((known.get(leaf.container) for leaf in arrays.values()), None)
        if adapter is None:
            return None
        target, where = None, (*path, ABOUT)
        if like is not None and self._inspector.inspect(like, path).kind is Kind.WRAPPED:
            here = adapter.unwrap(like, path)[ABOUT]
            target = like if digest(encode(here, where)) == digest(encode(about, where)) else None
        if target is None:
            parameter = make.parameter if make.parameter is not None else self._pattern(adapter, path, about)
            shapes = {key: (leaf.dtype, leaf.shape) for key, leaf in arrays.items()}
            target = adapter.new_wrapped(about, shapes, parameter, path)
        self._bind_wrapped(target, adapter, path, node, per_rank=False)
        return target

    def _pattern(self, adapter: Adapter, path: Path, about: Any) -> Any:
        layouts = self._layouts_of(adapter)
        return None if layouts is None else layouts.pattern(path, tuple(about["shape"]))

    def _own_of(self, path: Path, shared: Node | None) -> Node | None:
        """Return what the checkpoint has for a tensor that each rank has its own of, None where that does not fit."""
        own = self._source.own.find(path)
        if own is None or not self._source.resized:
            return shared if own is None else own
        ranks = f"saved per rank by {self._source.saved.world_size} ranks, loaded by {self._options.world_size}"
        self._mismatch(path, f"{ranks}; it is declared as ce.PerRank, which holds for the same number of ranks", own)
        return None

    def _differs(self, view: TensorView, entry: SavedArray, tensor: Any) -> str | None:
        leaf, cut, rank = entry.leaf, self._inspector.declared.cut_of(tensor), self._options.rank
        if view.shape != leaf.shape and cut is not None:
            return (
                f"shape {view.shape} here, {leaf.shape} in the checkpoint; rank {rank} has {cut.local}, declared "
                f"as {cut.about}: check dim, group and parts of its ce.Shard"
            )
        if view.shape != leaf.shape:
            return f"shape {view.shape} here, {leaf.shape} in the checkpoint"
        other = None if cut is None else cut.other_parts(entry.spread)
        if other is not None:
            return f"{other}; rank {rank} declares {cut.about if cut else ''}: check parts of its ce.Shard"
        if view.dtype == leaf.dtype:
            return None
        reason = f"dtype {view.dtype} here, {leaf.dtype} in the checkpoint"
        if not self._options.cast:
            return reason
        to_real = leaf.dtype.startswith("complex") and not view.dtype.startswith("complex")
        impossible = to_real or not _BITS_ONLY.isdisjoint({view.dtype, leaf.dtype})
        return f"{reason}, which `cast` can't convert" if impossible else None

    def _read(self, tensor: Any, adapter: Adapter, view: TensorView, entry: SavedArray, path: Path) -> None:
        parts = view.parts
        if view.dtype != entry.leaf.dtype:
            self._found.cast.append(path)
            buffers = [np.empty(part.box.shape, DTYPES[entry.leaf.dtype].numpy) for part in parts]
            memories = [_host_parts(buffer, path)[0].memory for buffer in buffers]
            parts = tuple(Part(part.box, memory) for part, memory in zip(parts, memories, strict=True))
            target = tensor.local if isinstance(tensor, ShardedArray) else tensor
            cut, convert = self._inspector.declared.cut_of(tensor), adapter.convert
            if cut is not None:
                convert = functools.partial(convert_cut, cut, adapter, path)
            memory = ArrayLeaf(path, view.dtype, view.shape, view.placement, view.parts, adapter.name)

            def fill() -> None:
                with room_for(entry.leaf, path, "the conversion"):
                    convert(target, buffers, entry.leaf.dtype)

            self._work.convert(fill, memory)
        leaf = ArrayLeaf(path, entry.leaf.dtype, view.shape, view.placement, parts, adapter.name)
        self._work.reads.append(Read(entry.path, entry.rank, leaf, (tensor, view) if parts is view.parts else None))

    def _fresh(self, entry: SavedArray, path: Path) -> Any:
        """Return a new array of the framework that the leaf came from, numpy's where that isn't imported.

        It lies in memory as the saved one did. What was spread over the ranks, and what belongs to an optimizer's
        parameters, is spread like the tensors that the state has: a whole copy on every rank would be no part of what
        the other ranks have.
        """
        known = {adapter.name: adapter for adapter in adapters()}
        adapter = known.get(entry.leaf.container, known["numpy"])
        dtype, shape = entry.leaf.dtype, entry.leaf.shape
        was_spread = entry.rank is None and entry.leaf.placement is Placement.SHARDED
        array = None
        if was_spread or any(path[:depth] in self._optimizer_states for depth in range(len(path))):
            with room_for(entry.leaf, path):
                array = self._spread(adapter, path, dtype, shape)
            if array is None and was_spread and self._options.world_size > 1:
                raise LoadMismatchError(
                    f"{dotted(path)}: was spread over the ranks when it was saved, and nothing in the state tells how "
                    "to spread it now. Pass the model in the same state, and the optimizer itself, not its "
                    "state_dict(); for an array of your own, ckptengine.ShardedArray(local, global_shape, offset); or "
                    "leave it out with `only`"
                )
        with room_for(entry.leaf, path):
            if array is None:
                array = adapter.empty(dtype, shape)
            if entry.told and not in_order(adapter.view(array, path, target=False), entry.order):
                array = adapter.new_like(array, entry.order)
        array = of_kind(array, entry, path)  # before it is read into: some frameworks copy for that
        self._read(array, adapter, self._target_view(array, adapter, path), entry, path)
        return array

    def _spread(self, adapter: Adapter, path: Path, dtype: str, shape: tuple[int, ...]) -> Any:
        layouts = self._layouts_of(adapter)
        return None if layouts is None else layouts.new(path, dtype, shape)

    def _layouts_of(self, adapter: Adapter) -> Layouts | None:
        if adapter.name not in self._layouts:
            self._layouts[adapter.name] = adapter.layouts(live_tensors(self._state, self._inspector))
        return self._layouts[adapter.name]

    # Plain values, and what is built anew from the checkpoint.

    def _bind_plain(self, value: Any, put: Put | None, path: Path, node: Node | None, per_rank: bool) -> None:
        node = self._as_a_whole(path, node, per_rank)
        if node is None:
            return
        placeholder = value is None or (isinstance(value, (dict, list, tuple, deque)) and not value)
        if node.holds_arrays and not placeholder:
            self._mismatch(path, f"{describe_type(value)} here, {node.description} in the checkpoint", node)
            return
        self._work.made = {}
        new = self._rebuild(node, path)
        self._found.loaded.append(dotted(path))
        if _may_take(value, new):
            self._work.act(SET, functools.partial(replace_contents, value, new))
        elif put is not None:
            self._work.act(SET, functools.partial(put, new))
        elif node.holds_arrays or digest(encode(value, path)) != digest(encode(new, path)):
            raise StateError(
                f"{dotted(path)}: the {describe_type(value)} lies in a tuple or another container that can't "
                "be changed, so it can't be loaded; use a list or a dict"
            )

    def _rebuild(self, node: Node, path: Path, like: Any = None, make: Maker | None = None) -> Any:
        """Return what was saved here, with new arrays or fitting ones of `like`, to be filled by `reads`.

        `make` makes the new arrays.
        """
        make = Maker(self._fresh, None) if make is None else make
        if isinstance(node.entry, SavedValue):
            node.used = True
            unknown = unknown_member(node.entry.value)
            if unknown is not None:
                raise LoadMismatchError(
                    f"{dotted(path)}: holds {unknown}, an enum's member; import the enum before the load"
                )
            return copy.deepcopy(node.entry.value)
        if isinstance(node.entry, SavedArray):
            node.used = True
            return self._rebuild_array(node.entry, path, like, make)
        about = _about(node)
        if about is not None:
            wrapped = self._rebuild_wrapped(node, about, path, like, make)
            if wrapped is not None:
                return wrapped
        result: dict[Any, Any] = {}
        if is_optimizer_state(node.children):
            self._optimizer_states.add(path)
        for key in node.children if node.ordered else sorted_like(node.children, like):
            result[key] = self._rebuild_item(node.children[key], (*path, key), item_of(like, key), make)
        self._look_for_live(like, path, node)
        if node.container is not None:
            return rebuild(node.container, result, like, path, strict=True)
        if node.kind != "ordered":
            return result
        ordered: Any = OrderedDict(result)
        # The versions of modules, which their own loading code asks for; old checkpoints do not tell.
        metadata = copy.deepcopy(node.metadata) if node.tells_metadata else getattr(like, "_metadata", None)
        if metadata is not None:
            ordered._metadata = metadata
        return ordered

    def _rebuild_item(self, node: Node, path: Path, like: Any, make: Maker | None) -> Any:
        """As `_rebuild`, for something inside; a live object stays itself and is loaded: nothing takes its place.

        So does a PerRank, which is bound by itself.
        """
        if isinstance(like, PerRank):
            return like
        lives = self._is_live(like, path)
        was_alive = node.cls is not None or node.kind == "module"
        if lives and (was_alive or node.kind is not None or not isinstance(node.entry, SavedValue)):
            self._bind_live(like, path, node)
            return like
        if lives or was_alive:
            here, there = describe_type(like), node.cls or ("a module" if was_alive else node.description)
            self._mismatch(
                path, f"{here} here, {there} in the checkpoint; make it before the load, as it was then", node
            )
            return like
        return self._rebuild(node, path, like, make)

    def _is_live(self, value: Any, path: Path) -> bool:
        """Whether a value takes its state itself."""
        if value is None or type(value) in SCALARS:
            return False
        return self._inspector.inspect(value, path).kind in (Kind.OBJECT, Kind.MODULE, Kind.OPTIMIZER)

    def _look_for_live(self, like: Any, path: Path, node: Node) -> None:
        """Tell live objects of which the checkpoint has nothing."""
        if isinstance(like, (Mapping, list, tuple, deque)):
            for own, item in like.items() if isinstance(like, Mapping) else enumerate(like):
                key = own if type(own) in (str, int) else repr(own)
                if key not in node.children and self._is_live(item, (*path, key)):
                    self._absent((*path, key), per_rank=False)

    @abstractmethod
    def _bind_live(self, value: Any, path: Path, node: Node) -> None:
        """Bind something that takes its state itself and lies in what is built anew."""

    def _rebuild_array(self, entry: SavedArray, path: Path, like: Any, make: Maker) -> Any:
        """Return a fitting array of `like`, or a new one, to be filled; a parameter where one was saved."""
        made = self._work.made.setdefault((entry.path, entry.rank), [])
        for array in made:  # another name of what was one tensor: it is one again
            if of_kind(array, entry, path) is array:
                return array
        array = of_kind(made[0] if made else self._array_of(entry, path, like, make), entry, path)
        made.append(array)
        return array

    def _array_of(self, entry: SavedArray, path: Path, like: Any, make: Maker) -> Any:
        found = self._inspector.inspect(like, path)
        if found.kind not in (Kind.TENSOR, Kind.SHARDED):
            return make.array(entry, path)
        # What another framework has here becomes what was saved, unless that one's framework isn't imported.
        if entry.leaf.container not in {one.name for one in adapters()} - {found.adapter.name}:
            try:
                view = self._target_view(like, found.adapter, path)
            except StateError:  # it can be saved, but not filled: a read-only or expanded tensor
                return make.array(entry, path)
            if (view.shape, view.dtype) == (entry.leaf.shape, entry.leaf.dtype):
                other = self._as_cut(of_kind(like, entry, path), like, path)
                view = view if other is like else self._target_view(other, found.adapter, path)
                return self._rebuild_like(other, found.adapter, view, entry, path)
        return make.array(entry, path)

    def _target_view(self, tensor: Any, adapter: Adapter, path: Path) -> TensorView:
        if isinstance(tensor, ShardedArray):
            return sharded_parts(tensor, path, target=True)
        return self._inspector.view(tensor, adapter, path, target=True)

    def _as_cut(self, new: Any, like: Any, path: Path) -> Any:
        """Return a tensor that takes another's place, and is cut as that is."""
        cut = self._inspector.declared.cut_of(like)
        if cut is not None and new is not like:
            self._inspector.declared.note(new, cut, path)
        return new

    def _rebuild_like(self, like: Any, adapter: Adapter, view: TensorView, entry: SavedArray, path: Path) -> Any:
        """Return a fitting array itself, to be filled; one like it where it lies in memory in another way.

        So too where its memory is that of another leaf: that of the model's parameter, for example, of which it is to
        become a copy. It may stay tied to a leaf that is read from the same array of the checkpoint.
        """
        if entry.leaf.placement is Placement.SHARDED and view.placement is not Placement.SHARDED:
            self._rebuilt.given.add(path)
        if entry.told and not in_order(view, entry.order):
            like = self._as_cut(of_kind(_new_like(like, adapter, entry, path), entry, path), like, path)
            view = self._target_view(like, adapter, path)
        if self._work.taken is None:
            self._read(like, adapter, view, entry, path)
            return like
        leaf = ArrayLeaf(path, view.dtype, view.shape, view.placement, view.parts, adapter.name)
        found = extents(leaf)
        for number in self._work.taken.meeting(found):
            read = self._work.reads[number]
            if (read.path, read.rank) == (entry.path, entry.rank) and list(read.places) == found:
                return like
            like = self._as_cut(of_kind(_new_like(like, adapter, entry, path), entry, path), like, path)
            view = self._target_view(like, adapter, path)
            found = extents(ArrayLeaf(path, view.dtype, view.shape, view.placement, view.parts, adapter.name))
            break
        self._work.taken.add(len(self._work.reads), found)
        self._read(like, adapter, view, entry, path)
        return like


def of_kind(array: Any, entry: SavedArray, path: Path) -> Any:
    """Return an array as what was saved: itself where it is of that kind already, or nobody knows the kind."""
    adapter = adapter_of_tensor(array)
    if adapter is None or not (entry.tells_kind or entry.kind is not None) or entry.leaf.container != adapter.name:
        return array
    return array if adapter.tensor_kind(array) == entry.kind else adapter.as_kind(array, entry.kind, path)


def _may_take(value: Any, new: Any) -> bool:
    """Whether a container becomes equal to a new one by taking its contents."""
    if type(value) is not type(new):
        return False
    if isinstance(value, deque):
        return isinstance(new, deque) and value.maxlen == new.maxlen
    if isinstance(value, defaultdict):
        return isinstance(new, defaultdict) and value.default_factory is new.default_factory
    return type(value) in (dict, list, Counter, OrderedDict, set)


def _about(node: Node) -> Any:
    """Return what is said of a tensor subclass whose inner tensors lie here, None where none does."""
    child = node.child(ABOUT)
    value = child.entry.value if child is not None and isinstance(child.entry, SavedValue) else None
    return value if isinstance(value, dict) and "class" in value and "context" in value else None


def _new_like(array: Any, adapter: Adapter, entry: SavedArray, path: Path) -> Any:
    with room_for(entry.leaf, path):
        if isinstance(array, ShardedArray):
            return ShardedArray(adapter.new_like(array.local, entry.order), array.global_shape, array.box.offset)
        return adapter.new_like(array, entry.order)


def _host_parts(buffer: np.ndarray[Any, Any], path: Path) -> tuple[Part, ...]:
    # The dtype is one of the format's own, also where numpy only keeps its bits.
    return NumpyAdapter().view(buffer, path, target=True).parts
