"""How a checkpoint is named, everywhere: a run, of which the newest is meant, RUN/step-40, or a run and a step."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ckptengine.catalog.listing import step_directory
from ckptengine.storage.base import Storage
from ckptengine.storage.open import is_url, local_path, open_storage

__all__ = ["checkpoint_path", "open_checkpoint"]

_STEP = re.compile(r"(?P<run>.*/)?step-(?P<step>\d{1,18})/?", re.DOTALL)


def checkpoint_path(location: str | os.PathLike[str], step: int | None = None) -> str:
    """Return the path or URL of a checkpoint as it lies there.

    A step may be short of zeros (RUN/step-40 for RUN/step-00000040), and may be given beside its run. Raises
    `ValueError` where it is given in both ways.
    """
    path = os.fspath(location)
    named = _STEP.fullmatch(path)
    if step is not None:
        if named is not None:
            raise ValueError(f"step={step} and {path!r}, which names a step itself: give the run, or no step=")
        return f"{path.rstrip('/') or '/'}/{step_directory(step)}"
    if named is None or (not is_url(path) and os.path.exists(local_path(path, "path"))):
        return path
    return f"{named['run'] or ''}{step_directory(int(named['step']))}"


def open_checkpoint(
    location: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    step: int | None = None,
    timeout: float | None = None,
) -> Storage:
    """Return the storage whose newest checkpoint is meant; raises what `checkpoint_path` and `open_storage` do."""
    return open_storage(checkpoint_path(location, step), options, timeout)
