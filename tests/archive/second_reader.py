"""A second reader, written from docs/format.md with zipfile, json and numpy alone."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np

NUMPY = {"bfloat16": "u2"}  # where numpy has no such name: the raw bits


def newest(path: Path) -> tuple[Path, dict]:
    """Return the directory of the data and the manifest of the newest checkpoint at a path."""
    found = []
    for file in [*path.glob("manifest-*.json"), *path.glob("step-*/manifest-*.json")]:
        manifest = json.loads(file.read_bytes())
        assert manifest["format_version"] == 1
        found.append((manifest["generation"], manifest["step"] or 0, file.parent, manifest))
    _, _, directory, manifest = max(found, key=lambda item: item[:2])
    return directory / f"data-{manifest['attempt']}", manifest


def read(path: str) -> tuple[dict[tuple, np.ndarray], dict[tuple, object]]:
    """Return all arrays and all plain values (typed JSON), by their paths, each after the rank it belongs to.

    The rank is None for what all share. Types that numpy does not have are raw bits.
    """
    data, manifest = newest(Path(path))
    entries: dict[str, bytes] = {}
    for record in manifest["archives"]:
        assert (data / record["name"]).stat().st_size == record["nbytes"]
        with zipfile.ZipFile(data / record["name"]) as archive:
            entries |= {name: archive.read(name) for name in archive.namelist()}
    arrays, values = {}, {}
    for name, content in entries.items():
        node = name.removesuffix("/zarr.json")
        if node == name:
            continue
        document = json.loads(content)
        about = document["attributes"].get("ckptengine", {})
        number = re.match(r"ranks/(\d{5})", node)
        rank = int(number[1]) if number else None
        if "values" in about:
            values |= {(rank, *path): value for path, value in about["values"]}
        elif "dtype" in about and document["node_type"] == "array":
            arrays[(rank, *about["path"])] = read_array(entries, node, document)
        elif "dtype" in about:
            arrays[(rank, *about["path"])] = read_fragments(entries, node, about["shape"])
    aliases = json.loads(entries["objects/zarr.json"])["attributes"]["ckptengine"]["aliases"]
    for number in manifest.get("value_ranks", []):
        shared = json.loads(entries[f"ranks/{number:05}/zarr.json"])["attributes"]["ckptengine"].get("shared", {})
        values = {(None, *path): value for path, value in shared.get("values", [])} | values
        aliases += shared.get("aliases", [])
        for path, groups in shared.get("groups", []):
            values[(None, *path)] = join(values.get((None, *path), []), groups)
    for alias, path in aliases:
        arrays.setdefault((None, *alias), arrays[(None, *path)])
    return arrays, values


def join(groups: list[dict], others: list[dict]) -> list[dict]:
    """Return the parameter groups of two ranks as one list; those that hold tensors are not read here."""
    result, free = [dict(group) for group in groups], [dict(group) for group in groups]
    for group in others:
        number = next((n for n, one in enumerate(free) if one and {**one, "params": 0} == {**group, "params": 0}), None)
        if number is None:
            result.append(group)
        else:
            new = [name for name in group["params"] if all(name not in one["params"] for one in groups)]
            result[number], free[number] = {**group, "params": [*result[number]["params"], *new]}, {}
    return result


def read_array(entries: dict[str, bytes], node: str, document: dict) -> np.ndarray:
    """Return one Zarr array from its chunks."""
    shape, kind = document["shape"], document["data_type"]
    chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
    array = np.empty(shape, np.dtype(NUMPY.get(kind, kind)).newbyteorder("<"))
    for cell in np.ndindex(*(-(-length // step) for length, step in zip(shape, chunk, strict=True))):
        stored = np.frombuffer(entries["/".join([node, "c", *map(str, cell)])], array.dtype).reshape(chunk)
        box = [(i * c, min(i * c + c, n)) for i, c, n in zip(cell, chunk, shape, strict=True)]
        inside = tuple(slice(0, stop - start) for start, stop in box)
        array[tuple(slice(*side) for side in box)] = stored[inside]
    return array


def read_fragments(entries: dict[str, bytes], node: str, shape: list[int]) -> np.ndarray:
    """Return a leaf that is stored as a group of boxes."""
    parts = []
    for name, content in entries.items():
        if re.fullmatch(re.escape(node) + r"/[^/]+/zarr\.json", name):
            document = json.loads(content)
            part = read_array(entries, name.removesuffix("/zarr.json"), document)
            parts.append((document["attributes"]["ckptengine"]["offset"], part))
    array = np.empty(shape, parts[0][1].dtype)
    for offset, part in parts:
        array[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return array
