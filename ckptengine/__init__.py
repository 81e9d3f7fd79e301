"""ckptengine: asynchronous, sharded, re-shardable checkpoints for training jobs, stored as Zarr."""

import sys

if sys.platform != "linux":
    raise ImportError(f"ckptengine runs on Linux only, and this is {sys.platform}: it needs /proc and /dev/shm")

import ckptengine.export  # noqa: F401 - first: imported later, the folder would take the place of the function
from ckptengine import errors
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
from ckptengine.state.merged import Merged
from ckptengine.state.per_rank import PerRank
from ckptengine.state.report import LoadReport
from ckptengine.state.rng import RNG
from ckptengine.state.sharded import ShardedArray

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
    "SaveHandle",
    "SaveStats",
    "ShardedArray",
    "Shards",
    "SingleProcess",
    "async_save",
    "errors",
    "export",
    "load",
    "save",
]
