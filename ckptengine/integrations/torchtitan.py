"""torchtitan: a checkpoint manager in the place of its own, with this engine's files below it."""

from __future__ import annotations

import base64
import json
import logging
import random
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.checkpointer import DATALOADER, MODEL, AsyncMode
from torchtitan.components.checkpointer import CheckpointManager as TitanManager
from torchtitan.tools import filesystem

from ckptengine import dcp
from ckptengine.catalog.listing import committed
from ckptengine.errors import LoadMismatchError
from ckptengine.frameworks.random_stream import PythonStream, RandomStream
from ckptengine.frameworks.registry import adapters
from ckptengine.state.values import decode, encode
from ckptengine.storage.open import open_storage

__all__ = ["CheckpointManager"]

_log = logging.getLogger("ckptengine")
RNG = "rng"


class CheckpointManager(TitanManager):  # type: ignore[misc]
    """Save and load torchtitan's checkpoints through `ckptengine.dcp`: torchtitan's own manager, with its options.

        config.checkpoint = CheckpointManager.Config(enable=True, interval=100)

    Model parts and optimizers are saved under torchtitan's flat names, so pipeline stages do not overwrite each other
    and any other parallel layout loads them. The training loader's position and each rank's random streams are typed
    values; nothing is pickled. A checkpoint that torch's DCP has written can be loaded, too, except its loader.

    `async_mode` is `"async"` by default; `"async_with_pinned_mem"` is the same here. Files for Hugging Face
    (`last_save_in_hf`, `initial_load_in_hf`) are torchtitan's own.

    Raises torch's `CheckpointException` with each failed rank's error, as `ckptengine.dcp` does.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TitanManager.Config):  # type: ignore[misc]
        """The options of torchtitan's manager."""

        async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "async"

    async_mode: AsyncMode
    pg: dist.ProcessGroup | None

    def __init__(self, config: Config, **parts: Any) -> None:
        super().__init__(config, **parts)
        if not self.enable:
            return
        if self.async_mode is AsyncMode.ASYNC_WITH_PINNED_MEM:
            self.async_mode = AsyncMode.ASYNC  # the engine's memory is pinned where that helps
        loader = self.states.get(DATALOADER)
        if isinstance(loader, StatefulDataLoader):
            if loader.generator is None:  # else each start draws a number from the global stream
                loader.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
            self.states[DATALOADER] = _Loader(loader)
        self.states[RNG] = _Streams()

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save a state dict; return a future if it is written in the background, else None."""
        if to_hf:
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        if async_mode is AsyncMode.DISABLED:
            dcp.save(state_dict, checkpoint_id=checkpoint_id)
            return None
        future = dcp.async_save(state_dict, checkpoint_id=checkpoint_id, process_group=self.pg)
        assert isinstance(future, Future)
        return future

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Fill a state dict, and the model parts."""
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        self._check_ranks(state_dict, checkpoint_id)
        dcp.load(state_dict, checkpoint_id=checkpoint_id)
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _check_ranks(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        """Leave the random streams out where another number of ranks has saved, or torchtitan's own manager.

        Raises `LoadMismatchError` where the data was split for another number of data-parallel ranks.
        """
        saved = dcp.Reader(checkpoint_id).read_metadata().state_dict_metadata
        ranks = sum(name.startswith(f"{RNG}.rank_") for name in saved)
        if RNG in state_dict and ranks != dist.get_world_size():
            del state_dict[RNG]
            _log.warning(
                "%s: holds the random streams of %d ranks, here are %d: they start as this job has seeded them",
                checkpoint_id, ranks, dist.get_world_size(),
            )  # fmt: skip
        loader = state_dict.get(DATALOADER)
        readers = sum(name.startswith(f"{DATALOADER}.dp_rank_") for name in saved)
        if isinstance(loader, _Loader) and readers != loader.ranks:
            raise LoadMismatchError(
                f"{checkpoint_id}: {DATALOADER} holds the position of {readers} data-parallel ranks, here are "
                f"{loader.ranks}: each reads another part of the data. Restart with as many, or with "
                f"exclude_from_loading=[{DATALOADER!r}] to begin the data anew"
            )

    def _find_load_step(self, folder: str = "") -> int:
        """Return the newest step with a committed checkpoint, -1 where there is none; rank 0 looks, for all."""
        folder = folder or self.folder
        found = torch.tensor([-1])
        if dist.get_rank() == 0:
            ours = _checkpoints(folder)
            found[0] = max(super()._find_load_step(folder), ours[0][0] if ours else -1)
        dist.broadcast(found, src=0, group=self._gloo())
        return int(found)

    def _gloo(self) -> dist.ProcessGroup | None:
        if self.pg is None:
            self.pg = dist.new_group(backend="gloo")
        return self.pg

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        saved: bool = super()._save(curr_step, last_step)
        if saved and last_step:
            self._purge_stale_checkpoints()
        return saved

    def _purge_stale_checkpoints(self) -> None:
        """Delete what is no longer to be kept: manifests first, so that no half of a checkpoint looks whole.

        Only what is committed counts: a save that is under way may come to nothing.
        """
        if not self._should_purge():
            return
        for _, path in _checkpoints(self.folder)[self.keep_latest_k :]:
            storage = open_storage(path)
            for entry in committed(storage):
                storage.delete(entry.manifest)
            self.purge_queue.put(path)


class _Loader:
    """A loader's position, each data-parallel rank's under a name of its own, as text instead of a pickle."""

    def __init__(self, loader: Any) -> None:
        self._loader, self.ranks = loader, loader.dp_world_size

    def state_dict(self) -> dict[str, Any]:
        """Return this data-parallel rank's position, and how many there are."""
        position = StatefulDataLoader.state_dict(self._loader)
        text = json.dumps(encode(position, (DATALOADER,)))
        return {self._loader._rank_id: text, "world_size": self.ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; raises `LoadMismatchError` where torchtitan's own manager has pickled it."""
        text = state[self._loader._rank_id]
        if not isinstance(text, str):
            raise LoadMismatchError(
                f"{DATALOADER}: torchtitan's own manager has pickled this position, which is not run here: give "
                f"exclude_from_loading=[{DATALOADER!r}, {RNG!r}], or go on with torchtitan's manager"
            )
        StatefulDataLoader.load_state_dict(self._loader, decode(json.loads(text)))


class _Streams:
    """The random streams of this rank, under a name of its own."""

    def state_dict(self) -> dict[str, str]:
        """Return the streams' states as text."""
        states = {name: base64.b64encode(one.get().tobytes()).decode() for name, one in _streams().items()}
        return {f"rank_{dist.get_rank()}": json.dumps(states)}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Set the streams that are here."""
        here = _streams()
        for name, text in json.loads(state[f"rank_{dist.get_rank()}"]).items():
            if name in here:
                data = np.frombuffer(bytearray(base64.b64decode(text)), np.uint8)
                here[name].check(data)
                here[name].set(data)


def _streams() -> dict[str, RandomStream]:
    streams: dict[str, RandomStream] = {"python": PythonStream(random._inst)}
    for adapter in adapters():
        streams |= adapter.random_streams()
    return streams


def _checkpoints(folder: str) -> list[tuple[int, str]]:
    """Return steps and paths of a folder's committed checkpoints of this engine, the newest first."""
    found = []
    for name in filesystem.listdir(folder) if filesystem.isdir(folder) else []:
        number = name.removeprefix("step-")
        path = filesystem.join(folder, name)
        if name.startswith("step-") and number.isdecimal() and filesystem.isdir(path) and committed(open_storage(path)):
            found.append((int(number), path))
    return sorted(found, reverse=True)
