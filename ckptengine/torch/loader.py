"""A DataLoader for what decides itself what comes next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader

__all__ = ["make_loader"]

_OWN_OPTIONS = frozenset(
    {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn", "generator"}
)
"""Options of a DataLoader that say which samples come, how they become batches, and what workers are seeded from."""

WORKER_TIMEOUT = 600
"""Seconds that a worker may take for one batch."""


def make_loader(dataset: Any, plan: Iterable[Any], options: dict[str, Any]) -> DataLoader[Any]:
    """Return a loader whose k-th item is `dataset[key]` for the k-th key of `plan`, unchanged.

    torch hands the keys to the workers in turn and gives their items in the order of the keys. `options` are any
    others of a DataLoader. It has a generator of its own: torch draws from it when an iteration begins.
    Workers have by default 600 s for an item, then torch raises `RuntimeError`; torch itself would wait for ever.
    Raises `TypeError` for an option that would change which samples come, or in which order.
    """
    odd = sorted(_OWN_OPTIONS & set(options))
    if odd or not options.get("in_order", True):
        name = odd[0] if odd else "in_order"
        hint = "give collate= to ElasticBatches" if name == "collate_fn" else "ElasticBatches decides that itself"
        raise TypeError(f"loader({name}=...): {hint}")
    if options.get("num_workers", 0) > 0:
        options = {"timeout": WORKER_TIMEOUT, **options}
    return DataLoader(dataset, sampler=plan, batch_size=None, collate_fn=_unchanged, generator=Generator(), **options)


def _unchanged(item: Any) -> Any:
    return item
