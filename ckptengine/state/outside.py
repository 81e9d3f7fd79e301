"""What a rank has of a state outside of its objects and optimizers: by this a load knows the split of a save again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from ckptengine.schema.path import Path, is_inside, path_order
from ckptengine.state.outline import Container

__all__ = ["outside_digest"]

_DIGITS = 16


def outside_digest(paths: Iterable[Path], containers: Iterable[Container]) -> str:
    """Return hexadecimal digits that are equal for equal leaves outside of objects and optimizers.

    Only what is outside is there before a load as it is afterwards: objects may fill themselves later.
    """
    roots = frozenset(one.path for one in containers if one.kind in ("object", "optimizer"))
    kept = sorted({path for path in paths if not is_inside(path, roots)}, key=path_order)
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:_DIGITS]
