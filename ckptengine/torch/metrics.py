"""Metrics of torchmetrics: what they count beside the values in their `state_dict`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ckptengine.errors import StateError
from ckptengine.schema.path import Path, dotted

__all__ = ["check_metrics", "metric_counters", "metric_values", "set_metric_counters"]

_COUNTERS = ("_update_count", "_num_vals_seen")
"""What torchmetrics 1.9 counts outside of the states that `add_state` makes: updates, by which means are weighed in
`forward`, and (`Running`) values, by which the place in the window is chosen."""


def check_metrics(module: torch.nn.Module, path: Path) -> None:
    """Raise `StateError` where a metric leaves values out of its `state_dict`: it must be told to keep them."""
    for prefix, metric in _metrics(module):
        if not all(metric._persistent.values()):
            name = prefix.removesuffix(".")
            raise StateError(
                f"{dotted((*path, name) if name else path)}: {type(metric).__name__} leaves its values out of its "
                "`state_dict`, so it would begin anew; call `persistent(True)` on it, or leave it out of the state"
            )


def metric_counters(module: torch.nn.Module) -> dict[str, int]:
    """Return the counters of the metrics in a module, by the keys they would have in its `state_dict`."""
    return {
        f"{prefix}{name}": vars(metric)[name]
        for prefix, metric in _metrics(module)
        for name in _COUNTERS
        if type(vars(metric).get(name)) is int
    }


def metric_values(module: torch.nn.Module) -> frozenset[str]:
    """Return the keys of the metrics' values: each rank has its own, of its own batches."""
    return frozenset(f"{prefix}{name}" for prefix, metric in _metrics(module) for name in metric._defaults)


def set_metric_counters(module: torch.nn.Module, counters: Mapping[str, int]) -> None:
    """Set counters by their keys, and forget what the metrics had computed of the values they had before."""
    for prefix, metric in _metrics(module):
        metric._computed = None
        for name in _COUNTERS:
            if f"{prefix}{name}" in counters:
                setattr(metric, name, counters[f"{prefix}{name}"])


def _metrics(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the metrics in a module with the prefixes of their keys; none where torchmetrics is not imported."""
    kind = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    if kind is not None:
        for name, part in module.named_modules(remove_duplicate=False):
            if isinstance(part, kind):
                yield f"{name}." if name else "", part
