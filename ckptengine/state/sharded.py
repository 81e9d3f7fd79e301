"""A rank's part of a global array, for code that shards by hand."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter
from ckptengine.frameworks.registry import adapter_of_tensor
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import Placement
from ckptengine.schema.type_name import describe_type
from ckptengine.state.cut import Cut

__all__ = ["ShardedArray"]


class ShardedArray:
    """Put this rank's part of a global array into the state.

    - `local`: a numpy array or a framework's plain tensor, of any supported dtype.
    - `global_shape`: the shape of the whole array, with one number for each dimension of `local`.
    - `offset`: where `local` begins in it, in elements along each dimension.

    Ranks may hold any boxes; together they must cover the array. Replicas may repeat a box. A rank that has nothing
    passes an array with a length of 0. Raises `StateError` if the box leaves the array, or the numbers of dimensions
    differ.
    """

    __slots__ = ("global_shape", "local", "offset")

    def __init__(self, local: Any, global_shape: Iterable[int], offset: Iterable[int]) -> None:
        self.local = local
        adapter = self.adapter
        self.global_shape = tuple(operator.index(length) for length in global_shape)
        self.offset = tuple(operator.index(start) for start in offset)
        view = adapter.view(local, ("ShardedArray",), target=False)
        shape = view.shape
        if view.placement is not Placement.REPLICATED:
            raise StateError("ShardedArray: the local part is itself distributed; pass it to the state as it is")
        if not len(shape) == len(self.global_shape) == len(self.offset):
            raise StateError(
                f"ShardedArray: local shape {shape}, global shape {self.global_shape} and offset "
                f"{self.offset} must have the same number of dimensions"
            )
        for start, length, whole in zip(self.offset, shape, self.global_shape, strict=True):
            if start < 0 or whole < 0 or start + length > whole:
                raise StateError(
                    f"ShardedArray: a part of shape {shape} at offset {self.offset} leaves the global shape "
                    f"{self.global_shape}"
                )

    @property
    def box(self) -> Box:
        """The elements that this rank holds."""
        return Box(self.offset, tuple(self.local.shape))

    @property
    def cut(self) -> Cut:
        """The place of the local part."""
        return Cut.at(tuple(self.local.shape), self.global_shape, self.offset)

    @property
    def adapter(self) -> Adapter:
        """The adapter of the local part."""
        adapter = adapter_of_tensor(self.local)
        if adapter is None:
            raise StateError(f"ShardedArray: the local part is {describe_type(self.local)}, not an array or tensor")
        return adapter

    def __repr__(self) -> str:
        return f"ShardedArray(local of shape {tuple(self.local.shape)}, {self.global_shape}, {self.offset})"
