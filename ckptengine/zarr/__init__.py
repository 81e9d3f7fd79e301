"""Checkpoints through zarr-python: the whole checkpoint as one lazy hierarchy, every byte read verified.

    group = ckptengine.zarr.open("runs/gpt")
    group["state/model/h.0.attn.qkv.weight"][:8]
"""

from __future__ import annotations

import os

import zarr

from ckptengine.zarr.store import CheckpointStore, tensorstore_spec

__all__ = ["CheckpointStore", "open", "tensorstore_spec"]


def open(path: str | os.PathLike[str]) -> zarr.Group:
    """Return the root group of the newest checkpoint of a run or a checkpoint directory, for reading.

    Arrays lie below `state`, escaped keys as node names (`docs/format.md`); nothing is read before it is used.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError`, `FormatVersionError`.
    """
    return zarr.open_group(CheckpointStore.at(path), mode="r", zarr_format=3)
