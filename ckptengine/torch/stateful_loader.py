"""torchdata's StatefulDataLoader: its state is one rank's, and is nothing at another number of ranks or workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptengine.schema.path import Path

__all__ = ["is_stateful_loader", "loader_mismatch"]

_WORKERS = ("_snapshot", "_main_snapshot", "_num_workers")


def is_stateful_loader(value: Any) -> bool:
    """Whether a value is a StatefulDataLoader or of a class made from it; imports nothing."""
    return any(
        kind.__name__ == "StatefulDataLoader" and kind.__module__.partition(".")[0] == "torchdata"
        for kind in type(value).__mro__
    )


def loader_mismatch(loader: Any, saved: Mapping[Path, Any], saved_world_size: int, world_size: int) -> str | None:
    """Return why a loader can't go on from what is saved, and what to do; None where it can.

    `saved` are the plain values of its saved state. The number of workers is told from the keys of torchdata 0.11: with
    workers, their number is in `_snapshot`. Without them there is `_num_yielded`; a class with a state of its own has
    neither, and checks for itself.
    """
    if saved_world_size != world_size:
        return (
            f"the position of a StatefulDataLoader on one of {saved_world_size} ranks, {world_size} ranks here: it "
            f"counts one rank's batches, so it can only go on with {saved_world_size} ranks. Restart with as many; or "
            "leave it out (`only=`) and begin an epoch. An ElasticSampler or ElasticBatches in its place goes on with "
            "any number of ranks"
        )
    workers = saved.get(_WORKERS, 0 if ("_num_yielded",) in saved else None)
    if workers is not None and workers != loader.num_workers:
        return (
            f"a StatefulDataLoader with num_workers={loader.num_workers} here, {workers} in the checkpoint: its "
            f"position is that of each worker. Make the loader with num_workers={workers}"
        )
    return None
