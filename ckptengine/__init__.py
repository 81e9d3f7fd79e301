"""ckptengine: asynchronous, sharded, re-shardable checkpoints for training jobs, stored as Zarr."""

import importlib
import sys
from typing import TYPE_CHECKING

if sys.platform != "linux":
    raise ImportError(f"ckptengine runs on Linux only, and this is {sys.platform}: it needs /proc and /dev/shm")

from ckptengine import errors

if TYPE_CHECKING:
    from ckptengine.api import async_save, export, load, save
    from ckptengine.catalog.keep import Best, KeepEvery, KeepLast, KeepSteps
    from ckptengine.checkpointer import Checkpointer
    from ckptengine.comm.single import SingleProcess
    from ckptengine.data.sampler import ElasticSampler
    from ckptengine.data.shards import Shards
    from ckptengine.data.stream import ElasticBatches
    from ckptengine.policy.exporting import Export
    from ckptengine.policy.hook import Commit
    from ckptengine.policy.interval import Auto
    from ckptengine.policy.preemption import Preemption
    from ckptengine.policy.rules import AtSteps, Every, Policy
    from ckptengine.save.handle import SaveHandle, SaveStats
    from ckptengine.state.declaration import Sharded
    from ckptengine.state.merged import Merged
    from ckptengine.state.per_rank import PerRank
    from ckptengine.state.report import LoadReport
    from ckptengine.state.rng import RNG
    from ckptengine.state.sharded import ShardedArray
    from ckptengine.state.shards import Renumbered, Shard
else:
    # Each name is imported when it is first asked for: all of them take half a second, and `import ckptengine` none.
    _MODULES = {
        "AtSteps": "ckptengine.policy.rules",
        "Auto": "ckptengine.policy.interval",
        "Best": "ckptengine.catalog.keep",
        "Checkpointer": "ckptengine.checkpointer",
        "Commit": "ckptengine.policy.hook",
        "ElasticBatches": "ckptengine.data.stream",
        "ElasticSampler": "ckptengine.data.sampler",
        "Every": "ckptengine.policy.rules",
        "Export": "ckptengine.policy.exporting",
        "KeepEvery": "ckptengine.catalog.keep",
        "KeepLast": "ckptengine.catalog.keep",
        "KeepSteps": "ckptengine.catalog.keep",
        "LoadReport": "ckptengine.state.report",
        "Merged": "ckptengine.state.merged",
        "PerRank": "ckptengine.state.per_rank",
        "Policy": "ckptengine.policy.rules",
        "Preemption": "ckptengine.policy.preemption",
        "RNG": "ckptengine.state.rng",
        "Renumbered": "ckptengine.state.shards",
        "SaveHandle": "ckptengine.save.handle",
        "SaveStats": "ckptengine.save.handle",
        "Shard": "ckptengine.state.shards",
        "Sharded": "ckptengine.state.declaration",
        "ShardedArray": "ckptengine.state.sharded",
        "Shards": "ckptengine.data.shards",
        "SingleProcess": "ckptengine.comm.single",
        "async_save": "ckptengine.api",
        "export": "ckptengine.api",
        "load": "ckptengine.api",
        "save": "ckptengine.api",
    }

    # Folders that have the name of a function: imported later, they would take its place.
    import ckptengine.export
    import ckptengine.load
    import ckptengine.save  # noqa: F401

    del export, load, save

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module 'ckptengine' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "RNG",
    "AtSteps",
    "Auto",
    "Best",
    "Checkpointer",
    "Commit",
    "ElasticBatches",
    "ElasticSampler",
    "Every",
    "Export",
    "KeepEvery",
    "KeepLast",
    "KeepSteps",
    "LoadReport",
    "Merged",
    "PerRank",
    "Policy",
    "Preemption",
    "Renumbered",
    "SaveHandle",
    "SaveStats",
    "Shard",
    "Sharded",
    "ShardedArray",
    "Shards",
    "SingleProcess",
    "async_save",
    "errors",
    "export",
    "load",
    "save",
]
