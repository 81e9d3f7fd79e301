"""What `torch.save` was given, as leaves and plain values with their paths, and tensors as boxes of a file."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import CheckpointDamagedError, ForeignFormatError, StateError
from ckptengine.foreign.description import Order, Piece
from ckptengine.foreign.names import TensorRef
from ckptengine.foreign.unpickle import Record, Unread, refusal
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path, dotted
from ckptengine.state.forms import Form, form_of, path_keys
from ckptengine.state.values import MAX_DEPTH, encode

__all__ = ["Tree", "pieces_of", "stored_order", "tree_of"]

_MOST_PIECES = 1 << 16
"""Pieces of one tensor at most: a tensor that is no dense array in any order is read run by run."""
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


@dataclass(slots=True)
class Tree:
    """Tensors and plain values by their paths, and the forms of the containers that hold tensors; `unread` names what
    is neither.
    """

    tensors: dict[Path, TensorRef] = field(default_factory=dict)
    values: dict[Path, Any] = field(default_factory=dict)
    containers: dict[Path, Form] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)
    visits: int = 0


def tree_of(value: Any, tree: Tree, path: Path, most: int, where: str) -> None:
    """Add what was pickled, from a path on, to a tree.

    `most` are the visits that it may take: a pickle can refer to one list often. Raises `CheckpointDamagedError` beyond
    that, `ForeignFormatError` naming the path for what is no plain value, though each part of it is one.
    """
    tree.visits += 1
    if tree.visits > most or len(path) > MAX_DEPTH:
        raise _endless(path, where)
    if isinstance(value, TensorRef):
        tree.tensors[path] = value
        return
    if _is_container(value, tree, most):
        try:
            form = form_of(value, path)
            keys = path_keys(value, path) if isinstance(value, Mapping) else range(len(value))
        except StateError as error:
            _refuse(value, tree, path, where, error)
            return
        if form is not None and path:
            tree.containers[path] = form
        items = value.values() if isinstance(value, Mapping) else value
        for key, item in zip(keys, items, strict=True):
            tree_of(item, tree, (*path, key), most, where)
        return
    _count(value, tree, path, most, where)
    try:
        encode(value, path)
    except StateError as error:
        _refuse(value, tree, path, where, error)
        return
    tree.values[path] = value


def _count(value: Any, tree: Tree, path: Path, most: int, where: str) -> None:
    """Count all that a plain value has inside: it is written out, also a list that it refers to often."""
    inside = [(value, 0)] if isinstance(value, _CONTAINERS) else []
    while inside:
        one, depth = inside.pop()
        if isinstance(one, dict):
            one = (*one, *one.values())
        tree.visits += len(one)
        if tree.visits > most:
            raise _endless(path, where)
        if depth < MAX_DEPTH:
            inside += [(item, depth + 1) for item in one if isinstance(item, _CONTAINERS)]


def _endless(path: Path, where: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"{where}: {dotted(path[:4])}…: nested without end, or larger than its pickle")


def _refuse(value: Any, tree: Tree, path: Path, where: str, error: StateError) -> None:
    """Note something that is not read, or a container of such; raise for anything else."""
    name = _unread_in(value, 0)
    if name is not None and not path:
        raise refusal(where, name) from None
    if name is None:
        raise ForeignFormatError(f"{where}: {error}") from None
    tree.unread[path] = name


def _unread_in(value: Any, depth: int, seen: set[int] | None = None) -> str | None:
    """Return the name of something that is not read in a value; looks at each container once."""
    seen = set() if seen is None else seen
    if isinstance(value, Unread | Record):
        return value.name if isinstance(value, Unread) else value.kind
    if depth > MAX_DEPTH or id(value) in seen or not isinstance(value, _CONTAINERS):
        return None
    seen.add(id(value))
    items = (*value, *value.values()) if isinstance(value, dict) else value
    return next((name for item in items if (name := _unread_in(item, depth + 1, seen)) is not None), None)


def _is_container(value: Any, tree: Tree, most: int) -> bool:
    """Whether a value is walked into, as the state's own walk does: dicts with plain keys, and what holds tensors."""
    if not isinstance(value, dict | list | tuple | deque) or isinstance(value, Counter) or not value:
        return False
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return True
    return _holds_tensors(value, tree, most, 0)


def _holds_tensors(value: Any, tree: Tree, most: int, depth: int) -> bool:
    tree.visits += 1
    if tree.visits > most or depth > MAX_DEPTH:
        return False  # the walk raises
    if isinstance(value, TensorRef):
        return True
    if not isinstance(value, dict | list | tuple | deque):
        return False
    items = value.values() if isinstance(value, dict) else value
    return any(_holds_tensors(item, tree, most, depth + 1) for item in items)


def stored_order(size: Sequence[int], stride: Sequence[int]) -> Order | None:
    """Return the dimensions from the outermost in memory inward where a tensor is a dense array; None where it is not.

    Dimensions of one element may have any stride.
    """
    order = sorted(range(len(size)), key=lambda dim: (-stride[dim] if size[dim] > 1 else 0, dim))
    if any(size[dim] == 1 for dim in order):  # they may lie anywhere: where they are in the shape is simplest
        rest = iter(dim for dim in order if size[dim] > 1)
        order = [dim if size[dim] == 1 else next(rest) for dim in range(len(size))]
    step = 1
    for dim in reversed(order):
        if size[dim] > 1 and stride[dim] != step:
            return None
        step *= size[dim]
    return tuple(order)


def pieces_of(ref: TensorRef, file: int, position: int, path: Path, where: str) -> tuple[Piece, ...]:
    """Return the pieces of a tensor whose storage's data starts at a position of a file.

    A dense tensor is one, in whatever order its dimensions lie; of any other each run of neighbours is one. Raises
    `ForeignFormatError` where these are too many.
    """
    size, stride, itemsize = ref.size, ref.stride, DTYPES[ref.dtype].itemsize
    start = position + ref.offset * itemsize
    if not math.prod(size):
        return ()
    order = stored_order(size, stride)
    if order is not None:
        return (Piece(Box.whole(size), file, start, 0, None if order == tuple(range(len(size))) else order),)
    # The innermost dimensions that lie densely, as one run.
    inner, step = len(size), 1
    while inner > 0 and (size[inner - 1] == 1 or stride[inner - 1] == step):
        step *= size[inner - 1]
        inner -= 1
    if math.prod(size[:inner]) > _MOST_PIECES:
        raise ForeignFormatError(
            f"{where}: {dotted(path)} is a view of shape {size} with strides {stride}, in "
            f"{math.prod(size[:inner]):,} pieces: make it contiguous() before torch.save"
        )
    shape = (*(1 for _ in range(inner)), *size[inner:])
    pieces = []
    for index in itertools.product(*map(range, size[:inner])):
        at = start + itemsize * sum(i * s for i, s in zip(index, stride, strict=False))
        pieces.append(Piece(Box((*index, *(0 for _ in size[inner:])), shape), file, at))
    return tuple(pieces)
