"""Memory for what the checkpoint has and the state still lacks, such as an optimizer's moments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from ckptengine.errors import DeviceError
from ckptengine.frameworks.registry import adapters
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path, dotted
from ckptengine.state.saved import SavedLeaf

__all__ = ["room_for"]


@contextlib.contextmanager
def room_for(leaf: SavedLeaf, path: Path, what: str = "a new tensor") -> Iterator[None]:
    """Have a framework that finds no memory for something of a leaf of the checkpoint raise `DeviceError`."""
    try:
        yield
    except tuple(kind for adapter in adapters() for kind in adapter.shortages) as error:
        nbytes = math.prod(leaf.shape) * DTYPES[leaf.dtype].itemsize
        raise DeviceError(
            f"{dotted(path)}: there is no memory for {what} ({leaf.dtype} of shape {leaf.shape}, over all ranks "
            f"{nbytes:,} bytes): {type(error).__name__}: {error}; free some, spread the state over more ranks, or "
            "leave it out with `only`"
        ) from error
