"""Checkpoints through zarr-python: the whole checkpoint as one lazy hierarchy, every byte read verified.

    group = ckptengine.zarr.open("runs/gpt")
    group["state/model/h.0.attn.qkv.weight"][:8]

Importing this package makes `bfloat16` known to zarr-python.
"""

from __future__ import annotations

import os

import zarr

from ckptengine.zarr.dimensions import DimensionNames
from ckptengine.zarr.dtype import BFloat16
from ckptengine.zarr.store import CheckpointStore
from ckptengine.zarr.tensorstore import open_tensorstore, tensorstore_spec

__all__ = ["BFloat16", "CheckpointStore", "open", "open_tensorstore", "tensorstore_spec"]


def open(
    path: str | os.PathLike[str], step: int | None = None, *, dimension_names: DimensionNames | None = None
) -> zarr.Group:
    """Return the root group of a checkpoint, for reading.

    `path` and `step` name it as in `ckptengine.load`: a run, of which the newest is taken or that of `step`, or
    RUN/step-40, or another checkpoint's directory.

    Arrays lie below `state` and `ranks/<rank>`, escaped keys as node names (`docs/format.md`); no array is read
    before it is indexed.

    `dimension_names` are for xarray, which opens no array without them: a dict of nodes and their dimensions' names,
    `{"state/model/weight": ("out", "in")}`. All other arrays, and all with "auto", get names of their own (`weight_0`,
    `weight_1`). The checkpoint stays as it is.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError`, `FormatVersionError`; for `dimension_names` `KeyError`
    where there is no such array, `ValueError` where their number is not that of its dimensions, `TypeError`.
    """
    store = CheckpointStore(path, step=step, dimension_names=dimension_names)
    return zarr.open_group(store, mode="r", zarr_format=3)
