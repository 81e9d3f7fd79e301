"""Where a rank's plain tensor lies in a global one that is declared to be split over the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter, TensorView
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import HostMemory, Memory, Part, Placement
from ckptengine.schema.path import Path, dotted
from ckptengine.state.moments import Moments

__all__ = ["Cut", "convert_cut", "cut_view", "state_cuts"]

_SCALARS = ((), (1,))
_BY_HAND = "by hand "


@dataclass(frozen=True, slots=True)
class Cut:
    """The boxes of a global array that a rank's local array has.

    `shape` and `local` are the two shapes, `pieces` pairs of a box of the global array and one, of the same shape, of
    the local one. `dims` are the dimensions that are split. `about` says in words what was declared. `parts` has, of
    the dimensions of which others have something too, the global lengths of the parts, each split by itself.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    pieces: tuple[tuple[Box, Box], ...]
    dims: frozenset[int]
    about: str = field(default="", compare=False)
    parts: tuple[tuple[int, tuple[int, ...]], ...] = field(default=(), compare=False)

    @classmethod
    def at(cls, local: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]) -> Cut:
        """Return the cut of an array that lies at an offset as a whole."""
        dims = frozenset(dim for dim, (here, whole) in enumerate(zip(local, shape, strict=True)) if here != whole)
        return cls(shape, local, ((Box(offset, local), Box.whole(local)),), dims)

    @property
    def spread(self) -> str | None:
        """What is stored of the parts, so that a load sees when others are declared: `by hand 0:32,16,16`."""
        said = (f"{dim}:{','.join(map(str, sizes))}" for dim, sizes in self.parts)
        return f"{_BY_HAND}{' '.join(said)}" if self.parts else None

    def other_parts(self, stored: str | None) -> str | None:
        """Return in words which parts a stored `spread` has where this cut has others, None where none differ."""
        if stored is None or not stored.startswith(_BY_HAND):
            return None
        mine = {str(dim): ",".join(map(str, sizes)) for dim, sizes in self.parts}
        for one in stored.removeprefix(_BY_HAND).split():
            dim, _, sizes = one.partition(":")
            if mine.get(dim, sizes) != sizes:
                return f"parts of the lengths {mine[dim]} along dimension {dim} here, {sizes} in the checkpoint"
        return None

    def like(self, local: tuple[int, ...], shape: tuple[int, ...]) -> Cut:
        """Return the cut of an array with other lengths along the dimensions that are not split."""
        pieces = tuple((self._other(one, shape), self._other(other, local)) for one, other in self.pieces)
        return Cut(shape, local, pieces, self.dims, self.about)

    def _other(self, box: Box, lengths: tuple[int, ...]) -> Box:
        offset = tuple(box.offset[dim] if dim in self.dims else 0 for dim in range(len(lengths)))
        shape = tuple(box.shape[dim] if dim in self.dims else length for dim, length in enumerate(lengths))
        return Box(offset, shape)


def cut_view(cut: Cut, adapter: Adapter, tensor: Any, path: Path, *, target: bool) -> TensorView:
    """Return a local tensor's view with its parts at their places in the global array.

    Raises `StateError` naming the path where the tensor has another shape than the one that was declared.
    """
    view = adapter.view(tensor, path, target=target)
    if view.shape != cut.local or view.placement is not Placement.REPLICATED:
        what = f"shape {view.shape}" if view.shape != cut.local else f"a {view.placement.value} tensor"
        raise StateError(
            f"{dotted(path)}: {what} now, declared with shape {cut.local} ({cut.about}); make the ce.Sharded anew, on "
            "all ranks, when tensors change"
        )
    parts = []
    for box, place in cut.pieces:
        if place.volume:
            parts.append(Part(box, _piece(view.parts[0].memory, place, adapter, tensor, path, target)))
    # Ranks with an empty part have no address to compare; what is tied on one rank is tied on all.
    identity = view.identity or ("declared", id(tensor))
    return TensorView(view.dtype, cut.shape, Placement.SHARDED, tuple(parts), identity)


def convert_cut(cut: Cut, adapter: Adapter, path: Path, tensor: Any, buffers: Any, dtype: str) -> None:
    """Fill a local tensor from host buffers of another dtype, one for each of the parts of its `cut_view`."""
    places = [place for _, place in cut.pieces if place.volume]
    for place, buffer in zip(places, buffers, strict=True):
        adapter.convert(_narrowed(adapter, tensor, place, path), [buffer], dtype)


def _piece(memory: Memory, place: Box, adapter: Adapter, tensor: Any, path: Path, target: bool) -> Memory:
    if isinstance(memory, HostMemory):
        start = sum(offset * stride for offset, stride in zip(place.offset, memory.strides, strict=True))
        return HostMemory(memory.address + start, memory.strides, memory.low, memory.nbytes, memory.owner)
    if place.shape == tuple(tensor.shape):
        return memory
    return adapter.view(_narrowed(adapter, tensor, place, path), path, target=target).parts[0].memory


def _narrowed(adapter: Adapter, tensor: Any, place: Box, path: Path) -> Any:
    if place.shape == tuple(tensor.shape):
        return tensor
    part = adapter.part_of(tensor, place)
    if part is None:
        raise StateError(
            f"{dotted(path)}: {adapter.name} gives no view of a part of a tensor, so its fused parts can't be taken "
            "apart here; save them as separate tensors"
        )
    return part


def state_cuts(
    cut: Cut, shapes: Mapping[Path, tuple[int, ...]], path: Path, *, stored: bool, moments: Moments
) -> dict[Path, Cut]:
    """Return how the arrays of a parameter's optimizer state are cut, by their keys; those that are not are left out.

    `shapes` are those of this rank's arrays, or with `stored` of the global ones. What has the parameter's shape is
    split as it is; of a square matrix, what `moments` has. Of a factored state (a mean over rows or over columns) the
    same holds along dimensions that are not averaged over; `step` and scalars are not split. Raises `StateError` for
    all others: it can't be known what they are parts of.
    """
    mine, global_ = cut.local, cut.shape
    whole = global_ if stored else mine
    split = [dim for dim in sorted(cut.dims) if mine[dim] != global_[dim]]
    found: dict[Path, Cut] = {}
    for keys, shape in shapes.items():
        if keys[-1] == "step" or (shape in _SCALARS and shape != whole):
            continue
        if shape == whole:
            if _is_square(whole, split) and not moments.has(keys):
                raise StateError(f"{dotted((*path, *keys))}: {_square(cut, shape, keys)}")
            found[keys] = replace(cut, parts=())  # the parameter itself says which parts it has
            continue
        if not _is_factor(shape, whole, split):
            raise StateError(f"{dotted((*path, *keys))}: {_unclear(cut, shape, whole)}")
        if any(whole[dim] == 1 for dim in split if dim >= len(whole) - 2):
            raise StateError(
                f"{dotted((*path, *keys))}: a state of shape {shape} of a parameter of shape {whole} ({cut.about}), "
                "whose length along the split dimension is 1, so means over it can't be told from parts of it; "
                "use an optimizer whose state has the parameter's shape"
            )
        lengths = {dim: (mine[dim], global_[dim]) for dim in split}
        local = tuple(lengths[dim][0] if dim in lengths else length for dim, length in enumerate(shape))
        everywhere = tuple(lengths[dim][1] if dim in lengths else length for dim, length in enumerate(shape))
        narrow = Cut(global_, mine, cut.pieces, frozenset(split), cut.about)
        found[keys] = narrow.like(local, everywhere)
    return found


def _is_square(whole: tuple[int, ...], split: list[int]) -> bool:
    """Whether what is made of a matrix as a whole, its rows times its rows, may have the shape of the matrix."""
    return len(whole) > 1 and whole[-1] == whole[-2] and max(split, default=0) >= len(whole) - 2


def _is_factor(shape: tuple[int, ...], whole: tuple[int, ...], split: list[int]) -> bool:
    """Whether an array is a mean of one of the parameter's shape over dimensions that are not split."""
    if len(shape) == len(whole):
        return all(here == there or (here == 1 and dim not in split) for dim, (here, there) in _both(shape, whole))
    # Of a stack of matrices, each cut as a whole, the means over rows or columns keep the dimensions before the last.
    if len(whole) < 3 or len(shape) != len(whole) - 1 or max(split, default=0) >= len(whole) - 2:
        return not split and len(shape) < len(whole)
    return shape in (whole[:-1], (*whole[:-2], whole[-1]))


def _both(one: tuple[int, ...], other: tuple[int, ...]) -> Any:
    return enumerate(zip(one, other, strict=True))


def _unclear(cut: Cut, shape: tuple[int, ...], whole: tuple[int, ...]) -> str:
    return (
        f"a state of shape {shape} of a parameter of shape {whole} ({cut.about}): it is not split as the parameter is, "
        "and was made of this rank's part alone, so it is nothing that another split could take over; use an optimizer "
        "whose state has the parameter's shape (AdamW, SGD), or wrap the model and its optimizer in ce.PerRank, which "
        "holds for the same number of ranks"
    )


def _square(cut: Cut, shape: tuple[int, ...], keys: Path) -> str:
    return (
        f"a state of the shape {shape} of a square matrix ({cut.about}): it may have an element for each of the "
        "matrix's, or be made of this rank's part as a whole, as a preconditioner is, and then be nothing that another "
        f"split could take over. Where it has an element for each, say so: ce.Sharded(…, moments=[{str(keys[-1])!r}]); "
        "else use an optimizer whose state has (AdamW, SGD), or wrap the model and its optimizer in ce.PerRank, which "
        "holds for the same number of ranks"
    )
