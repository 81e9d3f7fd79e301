"""Megatron-Core's sharded state dicts, saved and loaded by the engine in the place of its `dist_checkpointing`.

A tensor is stored under its key, as the array that it is over all ranks: the layers of a model are one array, whatever
pipeline stage each lies on. It is read into any other TP × PP.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, dict_list_map_outplace, merge
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base

import ckptengine as ce
from ckptengine.catalog.naming import open_checkpoint
from ckptengine.comm.agree import agree
from ckptengine.comm.select import current
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.frameworks.parts import ShardedParts
from ckptengine.frameworks.registry import framework
from ckptengine.load.choose import newest_or_foreign
from ckptengine.save.saver import DEFAULT_TIMEOUT
from ckptengine.schema.path import dotted
from ckptengine.state.values import decode, encode

__all__ = ["async_save", "load", "save", "state_of"]

TENSORS, OBJECTS, COMMON = "tensors", "objects", "common"


def save(sharded_state_dict: dict[str, Any], path: str | os.PathLike[str], **options: Any) -> ce.SaveStats:
    """Save a sharded state dict as one checkpoint and return its `SaveStats`. Collective: all ranks call it.

    `options` are those of `ckptengine.save`. Raises what that raises, and `StateError` for a `ShardedObject` whose data
    is neither plain values, tensors nor bytes.
    """
    return ce.save(path, state_of(sharded_state_dict), **options)


def async_save(sharded_state_dict: dict[str, Any], path: str | os.PathLike[str], **options: Any) -> ce.SaveHandle:
    """Start `save` in the background and return its `SaveHandle` once the snapshot is taken. Collective."""
    return ce.async_save(path, state_of(sharded_state_dict), **options)


def state_of(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert a sharded state dict to a state for `Checkpointer.save` and `step`, and return it.

    The main replica of each box is saved (`replica_id`), as in Megatron. What has no sharding ("common") must be equal
    on all ranks. The sharded state dict is not changed.
    """
    own = dict_list_map_outplace(lambda item: item, sharded_state_dict)
    apply_factories(own)
    _, own = extract_nonpersistent(own)
    sharded, common = extract_sharded_base(own)
    tensors, objects = _sorted(sharded)
    parts = {
        key: _parts(key, [one for one in ones if is_main_replica(one.replica_id)], ones[0])
        for key, ones in tensors.items()
    }
    packed = {one.unique_key: _packed(one.data, one.unique_key) for one in objects if is_main_replica(one.replica_id)}
    # An empty dict is a value, which all ranks would have to have.
    return {name: held for name, held in ((TENSORS, parts), (OBJECTS, packed), (COMMON, common)) if held}


def load(
    sharded_state_dict: dict[str, Any], path: str | os.PathLike[str], *, step: int | None = None, **options: Any
) -> dict[str, Any]:
    """Load into a sharded state dict, and return the state dict that it describes. Collective: all ranks call it.

    `path`, `step` and `options` are those of `ckptengine.load`, without `into`, `only` and `strict`. Tensors are filled
    in place, and created if they have no data. What a tensor with `allow_shape_mismatch` has beyond the stored one (a
    vocabulary with another padding) is zero. Other content of the checkpoint is ignored, as in Megatron. Raises
    `LoadMismatchError` on all ranks, naming what is missing or does not match.
    """
    sharded_state_dict, local, factories = load_preprocess(sharded_state_dict)
    sharded, _ = extract_sharded_base(sharded_state_dict)
    tensors, objects = _sorted(sharded)
    timeout = options.get("timeout", DEFAULT_TIMEOUT)
    stored = _stored_shapes(path, step, options.get("storage_options"), timeout) if _is_loose(tensors) else {}
    into: dict[str, Any] = {
        TENSORS: {key: _parts(key, ones, ones[0], stored.get(f"{TENSORS}.{key}")) for key, ones in tensors.items()},
        OBJECTS: {one.unique_key: None for one in objects},
        COMMON: None,
    }
    into = {name: held for name, held in into.items() if held != {}}
    report = ce.load(path, into=into, step=step, strict=False, **options)
    missing = [name for name in report.missing if name != COMMON]  # it is not stored where there was nothing in it
    wrong = [*(f"missing: {name}" for name in missing), *(f"mismatched: {line}" for line in report.mismatched)]
    error = LoadMismatchError(f"{path}: the checkpoint and the sharded state dict don't fit\n" + "\n".join(wrong))
    comm = options.get("comm") or current(timeout)
    agree(comm, error if wrong else None, timeout, f"matching {os.fspath(path)} with the sharded state dict")
    result: dict[str, Any] = into[COMMON] or {}
    merge(result, local)
    dict_list_map_inplace(lambda one: _unsharded(one, into.get(OBJECTS, {})), sharded)
    merge(result, sharded)
    loaded: dict[str, Any] = apply_factory_merges(result, factories)
    return loaded


def _sorted(sharded: Any) -> tuple[dict[str, list[ShardedTensor]], list[ShardedObject]]:
    tensors: dict[str, list[ShardedTensor]] = {}
    objects: list[ShardedObject] = []
    for one in _values(sharded):
        if isinstance(one, ShardedTensor):
            tensors.setdefault(one.key, []).append(one)
        elif isinstance(one, ShardedObject):
            objects.append(one)
        else:
            raise StateError(f"{getattr(one, 'key', one)}: a {type(one).__name__} is not supported")
    return tensors, objects


def _values(value: Any) -> Iterator[ShardedBase]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _values(item)
    else:
        yield value


def _parts(
    key: str, tensors: list[ShardedTensor], like: ShardedTensor, stored: tuple[int, ...] | None = None
) -> ShardedParts:
    """Return this rank's boxes of a key as one leaf; `stored` is the shape in the checkpoint, where it may differ."""
    adapter = framework("torch")
    shape = like.global_shape if stored is None or not like.allow_shape_mismatch else stored
    parts: dict[tuple[Any, ...], tuple[Any, tuple[int, ...]]] = {}
    for one in tensors:
        if one.flattened_range is not None:
            raise StateError(
                f"{key}: a slice of a flattened tensor has no box; have the distributed optimizer give "
                "metadata={'distrib_optim_sharding_type': 'fully_reshardable'}"
            )
        if one.global_shape != like.global_shape or one.dtype != like.dtype:
            raise StateError(f"{key}: {one.dtype} of {one.global_shape}, and {like.dtype} of {like.global_shape}, too")
        one.init_data("cpu")
        data = one.data.detach()
        if shape != one.global_shape:
            data.zero_()
            data = _within(data, one.global_offset[one.prepend_axis_num :], shape[one.prepend_axis_num :])
        known, _ = parts.setdefault((one.global_offset, tuple(data.shape)), (data, one.global_offset))
        if known is not data and known.data_ptr() != data.data_ptr():
            raise StateError(
                f"{key}: two tensors of this rank are one box, at {one.global_offset}; tie them, or leave one out"
            )
    return ShardedParts(adapter, str(like.dtype).removeprefix("torch."), tuple(shape), list(parts.values()))


def _within(data: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    for dim, (start, whole) in enumerate(zip(offset, shape, strict=True)):
        data = data.narrow(dim, 0, max(0, min(data.shape[dim], whole - start)))
    return data


def _stored_shapes(
    path: str | os.PathLike[str], step: int | None, storage_options: Mapping[str, Any] | None, timeout: float
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the checkpoint's arrays by their names."""
    storage = open_checkpoint(path, storage_options, step, timeout)
    return newest_or_foreign(storage, lambda one: {dotted(leaf.path): leaf.shape for leaf in one.rows.leaves})


def _is_loose(tensors: Mapping[str, list[ShardedTensor]]) -> bool:
    return any(one.allow_shape_mismatch for ones in tensors.values() for one in ones)


def _unsharded(one: Any, objects: Mapping[str, Any]) -> Any:
    if isinstance(one, ShardedTensor):
        return one.data
    return _unpacked(objects[one.unique_key]) if isinstance(one, ShardedObject) else one


def _packed(data: Any, name: str) -> np.ndarray[Any, Any]:
    """Return an object as the bytes of typed JSON: an array may lie on one rank only, and needs no pickle."""
    document = json.dumps(encode(_plain(data), (OBJECTS, name)))
    return np.frombuffer(document.encode(), np.uint8).copy()


def _unpacked(array: np.ndarray[Any, Any]) -> Any:
    return _restored(decode(json.loads(np.asarray(array).tobytes())))


def _plain(value: Any) -> Any:
    """Return a value with its tensors, arrays and in-memory files as plain values."""
    if isinstance(value, io.BytesIO):
        return {"in-memory file": value.getvalue()}
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        text = base64.b64encode(bits).decode()
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), text]}
    if isinstance(value, np.ndarray):
        return {"array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if type(value) is dict:
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _restored(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(_restored(item) for item in value)
    if type(value) is not dict:
        return value
    ((kind, inner),) = value.items()
    if kind == "in-memory file":
        return io.BytesIO(inner)
    if kind == "dict":
        return {_restored(key): _restored(item) for key, item in inner}
    dtype, shape, text = inner
    bits = bytearray(base64.b64decode(text))
    if kind == "array":
        return np.frombuffer(bits, np.dtype(dtype)).reshape(shape)
    if not bits:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(bits, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)
