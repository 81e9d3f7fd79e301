"""A small state of a step, and the steps that lie in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ckptengine.catalog.listing import committed
from ckptengine.storage.base import StorageView
from ckptengine.storage.local import LocalStorage

__all__ = ["state_of", "steps_in"]


def state_of(step: int, size: int = 10) -> dict[str, Any]:
    """Return a state whose array of `size` float64 has the step in each element."""
    return {"w": np.full(size, float(step)), "step": step}


def steps_in(run: Path | str | StorageView) -> list[int | None]:
    """Return the steps that are committed in a directory or a storage."""
    return [entry.step for entry in committed(run if isinstance(run, StorageView) else LocalStorage(run))]
