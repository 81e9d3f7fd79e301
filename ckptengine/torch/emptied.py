"""Parameters of which a runtime has taken the contents away, or keeps the real ones elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ckptengine.errors import StateError
from ckptengine.schema.path import Path, dotted

__all__ = ["gathered_once", "refuse_emptied"]

_kept = threading.local()
"""Of each thread: in how many blocks of `gathered_once` it is, and what was found there."""

_FSDP2 = "use `fully_shard` (FSDP2) with a plain optimizer instead"

# What each runtime puts on the parameters that it manages, and what is to be done. Names as of DeepSpeed 0.19
# (`runtime/zero/partition_parameters.py`), torch 2.13 (`distributed/fsdp/_common_utils.py`), FairScale 0.4
# (`nn/data_parallel/fully_sharded_data_parallel.py`).
_RUNTIMES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "DeepSpeed ZeRO-3",
        ("ds_id", "ds_shape", "ds_status"),
        "put the DeepSpeed engine into the state (`ckptengine.integrations.deepspeed.state(engine)`); or for the "
        "weights alone, put clones into the state that are "
        "made inside of `deepspeed.zero.GatheredParameters(list(model.parameters()))`, and after the restore copy them "
        f"back inside of it with `modifier_rank=0`; or {_FSDP2}",
    ),
    (
        "DeepSpeed ZeRO",
        ("_hp_mapping",),
        "put the DeepSpeed engine into the state (`ckptengine.integrations.deepspeed.state(engine)`): its next step "
        "would write its master weights over what was filled in here",
    ),
    (
        "FullyShardedDataParallel",
        ("_fsdp_flattened",),
        "put the FullyShardedDataParallel module itself into the state, not parameters or a part of it",
    ),
    ("FairScale's FullyShardedDataParallel", ("_is_sharded", "_orig_size"), _FSDP2),
)


def refuse_emptied(tensor: torch.Tensor, path: Path) -> None:
    """Raise `StateError` naming path and runtime where a tensor is a parameter that a runtime partitions by itself.

    Such a parameter is empty, or holds this rank's part without saying so; even where its contents have been gathered
    for the moment, what is filled into it is lost when it is released. Known by the attributes that the runtime sets.
    """
    if type(tensor) is torch.nn.Parameter and _is_gathered(tensor):
        raise StateError(
            f"{dotted(path)}: a parameter that `fully_shard` (FSDP2) has gathered for a forward pass, which goes when "
            "the module is sharded again, with what is filled into it; put the module itself into the state, or call "
            "its `reshard()` before its parameters are asked for"
        )
    attributes = tensor.__dict__
    if not attributes:
        return
    for runtime, marks, way in _RUNTIMES:
        if all(mark in attributes for mark in marks):
            whole = attributes.get("ds_shape")
            what = f"of shape {tuple(tensor.shape)} here" + ("" if whole is None else f", of {tuple(whole)} in all")
            raise StateError(f"{dotted(path)}: a parameter of {runtime}, {what}, which keeps its contents apart; {way}")


def _is_gathered(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is one that FSDP2 puts in a sharded one's place (torch 2.13, `_fsdp_param.py`)."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    known = getattr(_kept, "gathered", None)
    if known is None:
        known = _all_gathered()
        if getattr(_kept, "depth", 0):
            _kept.gathered = known
    return id(parameter) in known


@contextlib.contextmanager
def gathered_once() -> Iterator[None]:
    """Look once for all parameters that FSDP2 has gathered, within a `with` block of one thread: else for each."""
    _kept.depth = getattr(_kept, "depth", 0) + 1
    try:
        yield
    finally:
        _kept.depth -= 1
        if not _kept.depth:
            _kept.gathered = None


def _all_gathered() -> dict[int, torch.Tensor]:
    """Return the parameters that have been gathered at some time, by their `id`."""
    states: Any = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    found = (
        getattr(one, "_unsharded_param", None)
        for reference in list(states.values())
        for group in _groups(reference())
        for one in group.fsdp_params
    )
    return {id(parameter): parameter for parameter in found if parameter is not None}


def _groups(state: Any) -> list[Any]:
    """Return the groups of parameters of a module's FSDP2; older versions of torch have one at most."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    one = getattr(state, "_fsdp_param_group", None)
    return [] if one is None else [one]
