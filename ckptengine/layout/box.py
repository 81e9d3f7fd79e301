"""A box: the hyper-rectangle of a global tensor that one piece of memory or one stored chunk covers."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Box", "intersect"]


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


def intersect(a: Box, b: Box) -> Box | None:
    """Return the elements that both boxes cover, or None where there are none."""
    offset = tuple(map(max, a.offset, b.offset))
    end = tuple(min(ao + al, bo + bl) for ao, al, bo, bl in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    shape = tuple(e - o for o, e in zip(offset, end, strict=True))
    return Box(offset, shape) if all(length > 0 for length in shape) else None
