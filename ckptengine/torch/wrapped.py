"""Tensor subclasses that are made of other tensors, as quantized weights and optimizer states are.

They follow torch's protocol `__tensor_flatten__`/`__tensor_unflatten__` (`torch/utils/_python_dispatch.py`): the inner
tensors become leaves, and what else makes the subclass a value beside them. Inside a DTensor each rank has a subclass
for its rows. Which of its inner tensors are cut with the rows is found by cutting it: `slice` along the first
dimension, which such classes have for `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.frameworks.adapter import ABOUT
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.sharded import ShardedArray
from ckptengine.torch.dtensor import is_dtensor, row_runs
from ckptengine.torch.flat import FlatPart

__all__ = ["is_wrapped", "new_wrapped", "unwrap"]

_SHAPE = "the tensor's shape"
_PLAIN = (torch.Tensor, torch.nn.Parameter, FlatPart)


def is_wrapped(tensor: Any) -> bool:
    """Whether a tensor, or what a DTensor holds, is made of other tensors."""
    if type(tensor) in _PLAIN:
        return False
    local: Any = tensor._local_tensor if is_dtensor(tensor) else tensor
    return bool(is_traceable_wrapper_subclass(local) and not tensor.is_nested)


def unwrap(tensor: Any, path: Path) -> dict[str, Any]:
    """Return the inner tensors by name, a `ShardedArray` where ranks have parts of one, and under `ABOUT` a dict of
    plain values that says what they make.

    Raises `StateError` naming the path where a rank's part can't be told.
    """
    local, rows = tensor, None
    if is_dtensor(tensor):
        local, rows = tensor._local_tensor, _rows(tensor, path)
    names, context = local.__tensor_flatten__()
    inner = {name: getattr(local, name) for name in names}
    shape = tuple(local.shape)
    cut = _cut_names(local, inner)
    about = {
        "class": describe_type(local),
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "context": _plain(context, shape),
        "cut": None if cut is None else sorted(cut),
    }
    if rows is not None:
        if cut is None:
            raise StateError(
                f"{dotted(path)}: a distributed {describe_type(local)} can't be cut along its first dimension, so it "
                "can't be known which part of it this rank has; use a class that implements `aten.slice`, or "
                "ckptengine.PerRank around the local tensor"
            )
        inner |= {name: _part(inner[name], shape, rows, tensor.shape[0], path) for name in cut}
    return {**inner, ABOUT: about}


def _rows(tensor: Any, path: Path) -> int | None:
    """Return where this rank's rows of a DTensor start; None where every rank has all of them."""
    runs = row_runs(tensor, path)
    if runs is None:
        return None
    if len(runs) > 1:
        raise StateError(
            f"{dotted(path)}: this rank has rows of a {describe_type(tensor._local_tensor)} in several places "
            "(FSDP over tensor parallelism); shard it over one dimension of the mesh"
        )
    return runs[0][0] if runs else 0


def _part(item: Any, local: tuple[int, ...], start: int, rows: int, path: Path) -> ShardedArray:
    """Return an inner tensor as the part of the whole one that belongs to some rows."""
    per_row, exact = item.shape[0], local[0]
    whole, begin = rows * per_row, start * per_row
    if exact == 0 or whole % exact or begin % exact:
        raise StateError(
            f"{dotted(path)}: the blocks of the distributed tensor don't end where this rank's rows do ({exact} of "
            f"{rows} rows, from {start} on); choose sizes that the number of ranks and the block size divide"
        )
    return ShardedArray(item, (whole // exact, *item.shape[1:]), (begin // exact, *(0 for _ in item.shape[1:])))


def _cut_names(local: Any, inner: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the inner tensors of which some rows have a part only; None where the class can't be cut."""
    shapes = tuple((name, tuple(item.shape)) for name, item in inner.items())
    known = _known_cuts.get((type(local), tuple(local.shape), shapes))
    if known is None:
        known = _known_cuts[type(local), tuple(local.shape), shapes] = (_try_cuts(local, inner),)
    return known[0]


_known_cuts: dict[Any, tuple[frozenset[str] | None]] = {}


def _try_cuts(local: Any, inner: Mapping[str, Any]) -> frozenset[str] | None:
    if local.ndim == 0 or local.shape[0] < 2:
        return None
    rows, stride = local.shape[0], math.prod(local.shape[1:])
    tries = {rows // 2}
    for item in inner.values():
        if item.ndim and item.shape[0] and local.numel() % item.shape[0] == 0:
            block = local.numel() // item.shape[0]
            tries.add(block // math.gcd(block, stride))
    for count in sorted(tries, reverse=True):
        if not 0 < count < rows:
            continue
        try:
            with torch.no_grad():
                part = local[:count]
            names, _ = part.__tensor_flatten__()
            lengths = {name: tuple(getattr(part, name).shape) for name in names}
        except Exception:  # whatever a class says to a cut that it doesn't know
            continue
        cut = set()
        for name, item in inner.items():
            if lengths.get(name) == tuple(item.shape):
                continue
            if not item.ndim or lengths.get(name) != (item.shape[0] * count // rows, *item.shape[1:]):
                break
            cut.add(name)
        else:
            return frozenset(cut)
    return None


def _plain(value: Any, shape: tuple[int, ...]) -> Any:
    """Return a context as plain values: the shape, of which each rank has its own, by a word; what can't be made again
    from plain values as text, to be compared."""
    if isinstance(value, (tuple, list)) and tuple(value) == shape and all(type(item) is int for item in value):
        return {_SHAPE: type(value).__name__}
    if value is None or isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return value
    if type(value) in (bool, int, float, str, bytes, complex):
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(item, shape) for item in value)
    if type(value) is dict:
        return {key: _plain(item, shape) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name), shape) for field in dataclasses.fields(value)}
        return {"text": describe_type(value), "fields": fields}
    text = f"{describe_type(value)}.{value.name}" if isinstance(value, Enum) else repr(value)
    return {"text": re.sub(r"0x[0-9a-f]+", "0x", text)}


def new_wrapped(about: Any, arrays: Mapping[str, tuple[str, tuple[int, ...]]], parameter: Any, path: Path) -> Any:
    """Return a new tensor of the class that `about` (of `unwrap`) names, spread like a parameter; None: like nothing.

    `arrays` has dtype and global shape of each inner tensor. The class must have been imported: nothing is imported by
    what a checkpoint says. Raises `LoadMismatchError` naming the path where it can't be made.
    """
    kind = _class_of(about["class"])
    if kind is None:
        raise LoadMismatchError(
            f"{dotted(path)}: is a {about['class']} in the checkpoint; import it before the load, or fill a state that "
            "has such a tensor there (an optimizer that has taken a step)"
        )
    rows = about["shape"][0] if about["shape"] else 0
    shape, device = tuple(about["shape"]), "cpu"
    if parameter is not None:
        device = parameter.device
        if is_dtensor(parameter):
            shape = tuple(parameter._local_tensor.shape)
            device = parameter._local_tensor.device
    inner = {}
    for name, (dtype, whole) in arrays.items():
        if name in (about["cut"] or ()) and shape[:1] != (rows,):
            if not rows or whole[0] * shape[0] % rows:
                raise LoadMismatchError(
                    f"{dotted((*path, name))}: {whole[0]} blocks of {rows} rows can't be cut at this rank's {shape[0]} "
                    "rows; load with a number of ranks that divides them"
                )
            whole = (whole[0] * shape[0] // rows, *whole[1:])
        inner[name] = torch.zeros(whole, dtype=getattr(torch, dtype), device=device)
    try:
        local = kind.__tensor_unflatten__(inner, _context(about["context"], shape), torch.Size(shape), None)
    except Exception as error:
        raise LoadMismatchError(
            f"{dotted(path)}: a {about['class']} could not be made of what was saved ({type(error).__name__}: "
            f"{error}); fill a state that has such a tensor there (an optimizer that has taken a step)"
        ) from error
    if parameter is None or not is_dtensor(parameter):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _context(value: Any, shape: tuple[int, ...]) -> Any:
    """Return the context that `_plain` was called on, for a shape; raises ValueError where it holds text only."""
    if type(value) is dict:
        if set(value) == {_SHAPE}:
            return {"list": list, "Size": torch.Size}.get(value[_SHAPE], tuple)(shape)
        if "text" in value:
            raise ValueError(f"{value['text']} can't be made from plain values")
        return {key: _context(item, shape) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_context(item, shape) for item in value)
    return value


@lru_cache(maxsize=256)
def _class_of(name: str) -> Any:
    """Return a tensor class of a module that is imported already, by its full name."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:count]))
        if module is None:
            continue
        found: Any = module
        for part in parts[count:]:
            found = getattr(found, part, None)
        if isinstance(found, type) and issubclass(found, torch.Tensor) and hasattr(found, "__tensor_unflatten__"):
            return found
    return None
