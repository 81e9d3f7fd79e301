"""Names of dimensions, which xarray wants and a checkpoint does not have: put into the metadata when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

__all__ = ["DimensionNames", "Names", "chosen_names", "named"]

DimensionNames = Mapping[str, Sequence[str]] | Literal["auto"]
Names = dict[str, tuple[str, ...]]


def chosen_names(given: DimensionNames | None) -> Names | None:
    """Return the names that a caller gives for arrays by node, {} for "auto", None for none.

    Raises `TypeError` for names that are no strings, and `ValueError` where an array has one twice.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given != "auto":
            raise ValueError(f'dimension_names={given!r}: give "auto", or a dict of each array\'s names')
        return {}
    chosen: Names = {}
    for node, names in given.items():
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"dimension_names: {node}: {names!r} is not a sequence of strings, one for each dimension")
        if len(set(names)) != len(names):
            raise ValueError(f"dimension_names: {node}: {names!r} has a name twice")
        chosen[node.strip("/")] = tuple(names)
    return chosen


def named(document: bytes, node: str, names: Names) -> bytes:
    """Return the `zarr.json` of a node with names for its dimensions; that of a group as it is.

    An array that `names` does not have gets names that no other array of its group has: `weight_0`, `weight_1`.
    Raises `ValueError` where there are not as many names as dimensions.
    """
    metadata: dict[str, Any] = json.loads(document)
    if metadata["node_type"] != "array":
        return document
    dimensions = len(metadata["shape"])
    last = node.rpartition("/")[2]
    own = names.get(node, tuple(f"{last}_{number}" for number in range(dimensions)))
    if len(own) != dimensions:
        raise ValueError(
            f"dimension_names: {node} has {dimensions} dimensions (shape {metadata['shape']}), {len(own)} names are "
            f"given: {', '.join(own)}"
        )
    return json.dumps({**metadata, "dimension_names": list(own)}).encode()
