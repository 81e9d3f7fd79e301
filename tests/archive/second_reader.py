"""A second reader, written from docs/format.md with zipfile, json and numpy alone."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np

NUMPY = {"bfloat16": "<u2", "bool": "?"}  # where numpy has no such name: the raw bits


def newest(path: Path) -> tuple[Path, dict]:
    """Return the directory and the manifest of a run's or a directory's newest checkpoint."""
    found = []
    for manifest in [*path.glob("manifest-*.json"), *path.glob("step-*/manifest-*.json")]:
        document = json.loads(manifest.read_bytes())
        assert document["format_version"] == 1
        found.append((document["generation"], document["step"] or 0, manifest.parent, document))
    _, _, directory, document = max(found, key=lambda item: item[:2])
    return directory / f"data-{document['attempt']}", document


def read(path: str) -> tuple[dict[tuple, np.ndarray], dict[tuple, object]]:
    """Return all arrays (by (rank or None, *path), raw bits where numpy has no type) and all plain values."""
    data, manifest = newest(Path(path))
    entries: dict[str, bytes] = {}
    for record in manifest["archives"]:
        with zipfile.ZipFile(data / record["name"]) as archive:
            entries |= {name: archive.read(name) for name in archive.namelist()}
    arrays, values = {}, {}
    for name, content in entries.items():
        node = name.removesuffix("/zarr.json")
        if node == name:
            continue
        document = json.loads(content)
        about = document["attributes"].get("ckptengine", {})
        rank = re.match(r"ranks/(\d+)", node)
        owner = int(rank[1]) if rank else None
        if "values" in about:
            values |= {(owner, *value_path): value for value_path, value in about["values"]}
        if "dtype" not in about:
            continue
        if document["node_type"] == "array":
            array = read_array(entries, node, document)
        else:
            array = read_fragments(entries, node, about["shape"])
        arrays[(owner, *about["path"])] = array
    return arrays, values


def read_array(entries: dict[str, bytes], node: str, document: dict) -> np.ndarray:
    """Return one Zarr array from its chunks."""
    shape, kind = document["shape"], document["data_type"]
    chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
    array = np.zeros(shape, np.dtype(NUMPY.get(kind, kind)).newbyteorder("<"))
    if array.size == 0:
        return array
    for cell in np.ndindex(*(-(-length // c) for length, c in zip(shape, chunk))):
        stored = np.frombuffer(entries["/".join([node, "c", *map(str, cell)])], array.dtype).reshape(chunk)
        start = [i * c for i, c in zip(cell, chunk)]
        inside = tuple(slice(0, min(c, n - s)) for s, c, n in zip(start, chunk, shape))
        array[tuple(slice(s, s + c) for s, c in zip(start, chunk))] = stored[inside]
    return array


def read_fragments(entries: dict[str, bytes], node: str, shape: list[int]) -> np.ndarray:
    """Return a leaf that is stored as a group of boxes."""
    array = None
    for name, content in entries.items():
        if not re.fullmatch(re.escape(node) + r"/[^/]+/zarr\.json", name):
            continue
        document = json.loads(content)
        part = read_array(entries, name.removesuffix("/zarr.json"), document)
        array = np.zeros(shape, part.dtype) if array is None else array
        offset = document["attributes"]["ckptengine"]["offset"]
        array[tuple(slice(o, o + n) for o, n in zip(offset, part.shape))] = part
    return array
