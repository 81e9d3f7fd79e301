"""A box: the hyper-rectangle of a global tensor that one piece of memory or one stored chunk covers."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Box"]


@dataclass(frozen=True, slots=True)
class Box:
    """Offsets and lengths, in elements, one of each per dimension of the global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Return the box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a zero-dimensional box."""
        return math.prod(self.shape)
