"""Specs by which TensorStore opens a checkpoint, with none of our code on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from ckptengine.zarr.store import CheckpointStore, StoreIndex

__all__ = ["tensorstore_spec"]


def tensorstore_spec(path: str | os.PathLike[str], node: str) -> dict[str, Any]:
    """Return a TensorStore spec that opens one leaf of a checkpoint over all of its archives.

    `path` is a run or a checkpoint directory, of which the newest checkpoint is taken; `node` the leaf's place in
    the hierarchy, such as `state/model/weight`. A Zarr array is opened through the key-value stores `zip` and
    `kvstack`, the archives' keys mapped one by one; a leaf of fragments through the driver `stack`, one array for
    each. To be opened for reading; TensorStore reads without our checksums.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError`, and `KeyError` where there is no such leaf.
    """
    store = CheckpointStore(path)
    node = node.strip("/")
    document = _metadata(store, node)
    if document["node_type"] == "array":
        return _array(store, node)
    fragments = [f"{node}/{name}" for name in store.index().children[node] if name != "zarr.json"]
    if "shape" not in document["attributes"].get("ckptengine", {}) or not fragments:
        raise KeyError(f"{store}: {node!r} is a group of leaves, not a leaf; {', '.join(fragments[:5])} lie below it")
    data_type = _metadata(store, fragments[0])["data_type"]
    layers = [_fragment(store, fragment) for fragment in fragments]
    return {"driver": "stack", "dtype": data_type, "layers": layers}


def _metadata(store: CheckpointStore, node: str) -> dict[str, Any]:
    data = store.get_sync(f"{node}/zarr.json")
    if data is None:
        raise KeyError(f"{store}: there is no leaf {node!r}; the names of keys are escaped (docs/format.md)")
    document: dict[str, Any] = json.loads(data.to_bytes())
    return document


def _fragment(store: CheckpointStore, node: str) -> dict[str, Any]:
    """Return the spec of a fragment, moved to its place in the leaf."""
    document = _metadata(store, node)
    shape, offset = document["shape"], document["attributes"]["ckptengine"]["offset"]
    output = [{"input_dimension": dimension, "offset": -start} for dimension, start in enumerate(offset)]
    transform = {"input_inclusive_min": offset, "input_shape": shape, "output": output}
    return {**_array(store, node), "transform": transform}


def _array(store: CheckpointStore, node: str) -> dict[str, Any]:
    """Return the spec of a Zarr array, each of its keys a layer that names the archive in which it lies."""
    index = store.index()
    layers = []
    for key in _keys_below(index, node):
        rank, _ = index.entries[key]
        file = {"driver": "file", "path": store.checkpoint.archive(rank).location}
        layers.append({"base": {"driver": "zip", "base": file, "path": key}, "exact": key})
    return {"driver": "zarr3", "kvstore": {"driver": "kvstack", "layers": layers, "path": f"{node}/"}}


def _keys_below(index: StoreIndex, node: str) -> Iterator[str]:
    for name in index.children.get(node, ()):
        key = f"{node}/{name}"
        if key in index.entries:
            yield key
        yield from _keys_below(index, key)
