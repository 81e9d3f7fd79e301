"""Parts of tensors as runtimes with flat buffers keep them: a run of a tensor's elements, in one dimension.

FSDP1 and ZeRO lay several parameters one behind the other in a flat buffer, and cut that among the ranks wherever the
cut falls. What a rank has of one parameter is then a run of its elements in C order, which is no box; but it is a few:
at most two for each dimension but the last, and one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ckptengine.schema.box import Box
from ckptengine.schema.leaf import Placement

__all__ = ["FlatPart", "flat_pieces", "is_flat", "run_boxes"]


class FlatPart(torch.Tensor):
    """This rank's run of a tensor's elements, a view of the buffer that it lies in.

    Like a DTensor's, its `shape` is that of the whole tensor; torch's own calls see one dimension. `start` is the
    number of its first element, counted in the memory order `order` (dimensions from the outermost to the innermost).
    """

    global_shape: tuple[int, ...]
    start: int
    order: tuple[int, ...]
    whole: bool
    _buffer: Any
    _owner: Any
    pooled: bool

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def of(
        cls,
        run: torch.Tensor,
        shape: Sequence[int],
        start: int,
        *,
        whole: bool = False,
        order: Sequence[int] | None = None,
        buffer: torch.Tensor | None = None,
        owner: Any = None,
        borrowed: bool = False,
        pooled: bool = False,
    ) -> FlatPart:
        """Return a run of elements (one dimension, or none for a number) as a part of a tensor of a shape.

        `whole` says that every rank that has the tensor has all of it, `borrowed` that the buffer is kept by others,
        `pooled` that an optimizer knows the buffer, with all the parts in it, as one parameter, the `owner`.
        """
        part = torch.Tensor._make_subclass(cls, run.detach(), False)
        part.global_shape, part.start = tuple(shape), start
        part.order = tuple(range(len(part.global_shape))) if order is None else tuple(order)
        part.whole, part._owner = whole, None if owner is None else weakref.ref(owner)
        part.pooled, buffer = pooled, run if buffer is None else buffer
        part._buffer = weakref.ref(buffer) if borrowed else buffer
        return part

    @property
    def owner(self) -> Any:
        """The parameter by which an optimizer knows it; None for what is none."""
        return None if self._owner is None else self._owner()

    def known_as(self, owner: Any) -> None:
        """Note the parameter by which an optimizer knows it."""
        self._owner = weakref.ref(owner)

    @property
    def buffer(self) -> Any:
        """What it is a view of."""
        return self._buffer() if isinstance(self._buffer, weakref.ref) else self._buffer

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The shape of the whole tensor."""
        return torch.Size(self.global_shape)

    @property
    def run(self) -> torch.Tensor:
        """The elements that this rank has, as a plain tensor over the same memory."""
        return self.detach()

    @property
    def held(self) -> bool:
        """Whether this rank has anything of the tensor; of one without elements every rank has all."""
        return self.numel() > 0 or math.prod(self.global_shape) == 0

    def like(self, run: torch.Tensor, buffer: torch.Tensor | None = None, *, borrowed: bool = False) -> FlatPart:
        """Return the same part of another tensor of the same shape."""
        about: Any = {"whole": self.whole, "order": self.order, "owner": self.owner, "pooled": self.pooled}
        return FlatPart.of(run, self.global_shape, self.start, buffer=buffer, borrowed=borrowed, **about)


def is_flat(tensor: Any) -> bool:
    """Whether a value is a part of a tensor in a flat buffer."""
    return type(tensor) is FlatPart


def flat_pieces(part: FlatPart) -> tuple[tuple[int, ...], Placement, list[tuple[Box, torch.Tensor]]]:
    """Return global shape, placement, and this rank's boxes, each with its view of the buffer."""
    shape, run = part.global_shape, part.run.reshape(-1)
    placement = Placement.REPLICATED if part.whole else Placement.SHARDED
    lengths = [shape[dim] for dim in part.order]
    inverse = [part.order.index(dim) for dim in range(len(shape))]
    pieces, at = [], 0
    for box in run_boxes(lengths, part.start, part.start + run.numel()):
        count = math.prod(box.shape)
        view = run[at : at + count].view(box.shape).permute(inverse)
        pieces.append((Box(*(tuple(numbers[dim] for dim in inverse) for numbers in (box.offset, box.shape))), view))
        at += count
    return shape, placement, pieces


def run_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that elements `start` to `stop` of a tensor are, counted in C order, in that order."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    rest = tuple(shape[1:])
    first, begin = divmod(start, inner)
    last, end = divmod(stop, inner)
    if first == last:
        yield from _in_row(first, rest, begin, end)
        return
    if begin:
        yield from _in_row(first, rest, begin, inner)
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in rest)), (last - first, *rest))
    yield from _in_row(last, rest, 0, end)


def _in_row(row: int, rest: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for box in run_boxes(rest, start, stop):
        yield Box((row, *box.offset), (1, *box.shape))
