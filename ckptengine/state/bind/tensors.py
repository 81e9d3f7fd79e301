"""How tensors and plain values are bound, and how what is built anew is built."""

from __future__ import annotations

import copy
import functools
from collections import Counter, OrderedDict
from typing import Any

import numpy as np

from ckptengine.errors import StateError
from ckptengine.state.adapters import Adapter, TensorView, adapters, describe_type
from ckptengine.state.arrays import NumpyAdapter
from ckptengine.state.bind.base import CONVERT, SET, BinderBase, Put
from ckptengine.state.bind.sharing import extents
from ckptengine.state.binding import Read
from ckptengine.state.dtypes import DTYPES
from ckptengine.state.kinds import Kind
from ckptengine.state.leaf import ArrayLeaf, Part, Path, dotted
from ckptengine.state.nested import item_of, replace_contents, sorted_like
from ckptengine.state.outline import in_order
from ckptengine.state.saved import Node, SavedArray, SavedLeaf, SavedValue
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.tree import sharded_parts
from ckptengine.state.values import digest, encode

__all__ = ["TensorBinder"]

_BITS_ONLY = frozenset({"complex32", "float4_e2m1fn_x2"})  # numpy has no arithmetic for these


class TensorBinder(BinderBase):
    """Binds the leaves: tensors, and plain values."""

    def _bind_tensor(self, tensor: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        if not self._selection.holds(path):
            return
        view = _target_view(tensor, adapter, path)
        if node is None:
            self._lacks_arrays = True
            self._absent(path, per_rank, view.identity)
        elif not isinstance(node.entry, SavedArray):
            self._mismatch(path, f"a tensor here, {node.description} in the checkpoint", node)
        elif self._is_filled(view, node.entry):
            node.use()  # tied: one of its names has brought the bytes
            self._loaded.append(dotted(path))
        elif reason := self._differs(view, node.entry.leaf):
            self._lacks_arrays = True
            self._mismatch(path, reason, node)
        else:
            node.use()
            self._loaded.append(dotted(path))
            number = len(self.reads)
            self._read(tensor, adapter, view, node.entry, path)
            if view.identity is not None and (first := self._filled.setdefault(view.identity, number)) != number:
                self._ties.append((first, number))  # whether both bring the same is seen before anything is read

    def _is_filled(self, view: TensorView, entry: SavedArray) -> bool:
        """Whether the very same array of the checkpoint is read into a memory under another name."""
        if view.identity is None or view.identity not in self._filled:
            return False
        read = self.reads[self._filled[view.identity]]
        return (read.path, read.rank) == (entry.path, entry.rank)

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
            self._act(CONVERT, functools.partial(adapter.convert, target, buffers, entry.leaf.dtype))
            memory = ArrayLeaf(path, view.dtype, view.shape, view.placement, view.parts, adapter.name)
            self._converted[len(self.reads)] = memory, self.actions[-1]
        leaf = ArrayLeaf(path, entry.leaf.dtype, view.shape, view.placement, parts, adapter.name)
        self.reads.append(Read(entry.path, entry.rank, leaf))

    def _fresh(self, entry: SavedArray, path: Path) -> Any:
        """Return a new array of the framework that the leaf came from, numpy's where that isn't imported.

        It lies in memory as the saved one did.
        """
        known = {adapter.name: adapter for adapter in adapters()}
        adapter = known.get(entry.leaf.container, known["numpy"])
        array = adapter.empty(entry.leaf.dtype, entry.leaf.shape)
        if entry.order is not None:
            array = adapter.new_like(array, entry.order)
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
            self._act(SET, functools.partial(replace_contents, value, new))
        elif put is not None:
            self._act(SET, functools.partial(put, new))
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
        for key in node.children if node.ordered else sorted_like(node.children, like):
            result[key] = self._rebuild(node.children[key], (*path, key), item_of(like, key))
        if node.container is not None and set(result) == set(range(len(result))):
            items = [result[index] for index in range(len(result))]
            return tuple(items) if node.container == "tuple" else items
        return OrderedDict(result) if node.kind == "ordered" else result

    def _rebuild_array(self, entry: SavedArray, path: Path, like: Any) -> Any:
        kind, adapter = (Kind.PLAIN, None) if like is None else self._inspector.kind(like, path)
        if adapter is not None and kind in (Kind.TENSOR, Kind.SHARDED):
            try:
                view = _target_view(like, adapter, path)
            except StateError:  # it can be saved, but not filled: a read-only or expanded tensor
                return self._fresh(entry, path)
            if (view.shape, view.dtype) == (entry.leaf.shape, entry.leaf.dtype):
                return self._rebuild_like(like, adapter, view, entry, path)
        return self._fresh(entry, path)

    def _rebuild_like(self, like: Any, adapter: Adapter, view: TensorView, entry: SavedArray, path: Path) -> Any:
        """Return a fitting array itself, to be filled; one like it where it lies in memory in another way.

        So too where its memory is that of another leaf: that of the model's parameter, for example, of which it is to
        become a copy. It may stay tied to a leaf that is read from the same array of the checkpoint.
        """
        if entry.told and not in_order(view, entry.order):
            like = adapter.new_like(like, entry.order)
            view = adapter.view(like, path, target=True)
        if self._taken is None:
            self._read(like, adapter, view, entry, path)
            return like
        leaf = ArrayLeaf(path, view.dtype, view.shape, view.placement, view.parts, adapter.name)
        found = extents(leaf)
        for number in self._taken.meeting(found):
            read = self.reads[number]
            if (read.path, read.rank) == (entry.path, entry.rank) and extents(read.target) == found:
                return like
            like = adapter.new_like(like, entry.order)
            view = adapter.view(like, path, target=True)
            found = extents(ArrayLeaf(path, view.dtype, view.shape, view.placement, view.parts, adapter.name))
            break
        self._taken.add(len(self.reads), found)
        self._read(like, adapter, view, entry, path)
        return like


def _target_view(tensor: Any, adapter: Adapter, path: Path) -> TensorView:
    if isinstance(tensor, ShardedArray):
        return sharded_parts(tensor, path, target=True)
    return adapter.view(tensor, path, target=True)


def _host_parts(buffer: np.ndarray[Any, Any], path: Path) -> tuple[Part, ...]:
    # The dtype is one of the format's own, also where numpy only keeps its bits.
    return NumpyAdapter().view(buffer, path, target=True).parts
