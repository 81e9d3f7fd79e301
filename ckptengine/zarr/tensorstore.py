"""Specs by which TensorStore opens a checkpoint, with none of our code on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ckptengine.zarr.store import CheckpointStore, StoreIndex

__all__ = ["open_tensorstore", "tensorstore_spec"]

# TensorStore's key-value stores by the protocols of URLs; all others have none that reads what fsspec wrote.
_DRIVERS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def open_tensorstore(path: str | os.PathLike[str], node: str) -> Any:
    """Return one leaf of a checkpoint as a `tensorstore.TensorStore`, opened for reading only.

    Takes and raises what `tensorstore_spec` does; raises `ModuleNotFoundError` without the package tensorstore.
    """
    try:
        import tensorstore
    except ModuleNotFoundError as error:
        if error.name != "tensorstore":
            raise
        raise ModuleNotFoundError(
            "open_tensorstore needs TensorStore: pip install tensorstore", name=error.name
        ) from None
    return tensorstore.open(tensorstore_spec(path, node), read=True, write=False).result()


def tensorstore_spec(path: str | os.PathLike[str], node: str) -> dict[str, Any]:
    """Return a TensorStore spec that opens one leaf of a checkpoint over all of its archives.

    `path` is a run or a checkpoint directory, of which the newest checkpoint is taken; `node` the leaf's place in
    the hierarchy, such as `state/model/weight`. A Zarr array is opened through the key-value stores `zip` and
    `kvstack`, the archives' keys mapped one by one; a leaf of fragments through the driver `stack`, one array for
    each. TensorStore reads without our checksums.

    TensorStore's zip driver rewrites a whole archive when something is assigned. So the spec is that of a view which
    TensorStore can only read (`downsample` by 1, method `stride`: the same elements). What is opened from its `base`
    can be written to: an assignment to that destroys the checkpoint.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError`, `KeyError` where there is no such leaf, and `ValueError`
    for a place that TensorStore can't read: it knows directories, `s3://` and `gs://`.
    """
    store = CheckpointStore(path)
    node = node.strip("/")
    _kvstore(store.checkpoint.archive(0).location)
    spec, dimensions = _leaf(store, node)
    return {
        "driver": "downsample",
        "base": spec,
        "downsample_factors": [1] * dimensions,
        "downsample_method": "stride",
    }


def _leaf(store: CheckpointStore, node: str) -> tuple[dict[str, Any], int]:
    """Return the spec that reads, and would write, a leaf, and its number of dimensions."""
    document = _metadata(store, node)
    if document["node_type"] == "array":
        return _array(store, node), len(document["shape"])
    fragments = [f"{node}/{name}" for name in store.index().children[node] if name != "zarr.json"]
    if "shape" not in document["attributes"].get("ckptengine", {}) or not fragments:
        raise KeyError(f"{store}: {node!r} is a group of leaves, not a leaf; {', '.join(fragments[:5])} lie below it")
    data_type = _metadata(store, fragments[0])["data_type"]
    layers = [_fragment(store, fragment) for fragment in fragments]
    dimensions = len(document["attributes"]["ckptengine"]["shape"])
    return {"driver": "stack", "dtype": data_type, "layers": layers}, dimensions


def _kvstore(location: str) -> dict[str, Any]:
    """Return TensorStore's key-value store of one file."""
    protocol, separator, _ = location.partition("://")
    if not separator:
        return {"driver": "file", "path": location}
    driver = _DRIVERS.get(protocol)
    if driver is None:
        raise ValueError(
            f"{location}: TensorStore has no driver for {protocol}:// that reads this. It reads directories, s3:// and "
            "gs://; use ckptengine.zarr.open, or bring the checkpoint to a directory with `ckptengine prefetch`"
        )
    url = urlsplit(location)
    spec = {"driver": driver, "bucket": url.netloc, "path": url.path.lstrip("/")}
    if driver == "s3" and (endpoint := _endpoint()):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION") or _region()}
    return spec


def _endpoint() -> str | None:
    """Return the address of the S3-compatible store that the environment names, as s3fs finds it."""
    names = ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _region() -> str:
    return os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


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
        file = _kvstore(store.checkpoint.archive(rank).location)
        layers.append({"base": {"driver": "zip", "base": file, "path": key}, "exact": key})
    return {"driver": "zarr3", "kvstore": {"driver": "kvstack", "layers": layers, "path": f"{node}/"}}


def _keys_below(index: StoreIndex, node: str) -> Iterator[str]:
    for name in index.children.get(node, ()):
        key = f"{node}/{name}"
        if key in index.entries:
            yield key
        yield from _keys_below(index, key)
