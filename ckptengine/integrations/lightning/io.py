"""`CheckpointIO`, a plugin for those who keep `ModelCheckpoint`, `trainer.save_checkpoint` and `fabric.save`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

import ckptengine
from ckptengine.catalog.listing import committed
from ckptengine.comm.single import SingleProcess
from ckptengine.save.handle import SaveHandle
from ckptengine.save.saver import DEFAULT_TIMEOUT
from ckptengine.storage.open import open_storage

try:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO as LightningIO
except ModuleNotFoundError:  # the same code under its older name
    from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO as LightningIO

__all__ = ["CheckpointIO"]


class CheckpointIO(LightningIO):  # type: ignore[misc]
    """Write Lightning's checkpoints with ckptengine: `Trainer(plugins=[CheckpointIO()])`, `Fabric(plugins=…)`.

    Each is a directory under the name that Lightning chooses, committed by its manifest, verified when it is read, and
    without pickle: what is neither an array nor a typed value is refused by its path (`StateError`). Under DDP
    Lightning calls it on rank 0 alone, so it never waits for another rank.

    - `background`: return from a save when the copy is complete. The next call waits for that save, and raises
      `SaveFailedError` if it has failed. What a save replaces is deleted once it is durable.
    - `timeout`: seconds; bounds each wait for the storage.

    A `.ckpt` file that Lightning wrote can be read, too, if it holds arrays and typed values.
    """

    def __init__(self, *, background: bool = False, timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__()
        self._background, self._timeout = background, timeout
        self._handle: SaveHandle | None = None
        self._to_remove: list[str] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """Save a dict; `storage_options` are those of fsspec, for a URL."""
        self._settle()
        place = os.fspath(path)
        if "://" not in place:
            os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
        self._handle = ckptengine.async_save(
            place, checkpoint, timeout=self._timeout, comm=SingleProcess(), storage_options=storage_options
        )
        if not self._background:
            self._settle()

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what was saved, with its tensors on the CPU, or on `map_location` if that is a device.

        No code in the file is ever run, so `weights_only` changes nothing.
        """
        self._settle()
        checkpoint = ckptengine.load(path, as_torch=True, timeout=self._timeout)
        return checkpoint if map_location is None or callable(map_location) else _moved(checkpoint, map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint, its manifest first; if a save is in progress, once it is durable."""
        self._to_remove.append(os.fspath(path))
        if self._handle is None:
            self._settle()

    def teardown(self) -> None:
        """Wait for the save in progress."""
        self._settle()

    def _settle(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.durable.result(self._timeout)
        while self._to_remove:
            _remove(self._to_remove.pop(0))


def _remove(path: str) -> None:
    if os.path.isfile(path) or os.path.islink(path):
        os.remove(path)
        return
    storage = open_storage(path)
    for entry in committed(storage):
        storage.delete(entry.manifest)
    parent, _, name = path.rstrip("/").rpartition("/")
    open_storage(parent or ".").delete_tree(name)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if type(value) in (list, tuple) else value
