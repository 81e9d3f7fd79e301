"""Several tensors that are boxes of one larger array, as one leaf of a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ckptengine.frameworks.adapter import Adapter, TensorView
from ckptengine.frameworks.registry import register
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import DeviceMemory, HostMemory, Memory, Part, Placement
from ckptengine.schema.path import Path

__all__ = ["PartsAdapter", "ShardedParts"]


class ShardedParts:
    """This rank's tensors, of one framework and dtype, that are boxes of an array of `shape`; it may have none.

    Each comes with its offset in the array, which may have more dimensions than the tensor: those before are of length
    1 there. `dtype` is the logical name.
    """

    __slots__ = ("__weakref__", "adapter", "dtype", "offsets", "shape", "tensors")

    def __init__(
        self, adapter: Adapter, dtype: str, shape: tuple[int, ...], parts: Sequence[tuple[Any, tuple[int, ...]]]
    ) -> None:
        self.adapter, self.dtype, self.shape = adapter, dtype, shape
        self.tensors = [tensor for tensor, _ in parts]
        self.offsets = [offset for _, offset in parts]


class PartsAdapter(Adapter):
    """What `Adapter` asks of tensors, answered for several that are one leaf."""

    name = "parts"

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a `ShardedParts`."""
        return isinstance(value, ShardedParts)

    def container_of(self, tensor: Any) -> str:
        """Return the framework of the tensors."""
        framework: str = tensor.adapter.name
        return framework

    def view(self, tensor: Any, path: Path, *, target: bool) -> TensorView:
        """Return the tensors' memory at their places; raises what their framework's adapter raises."""
        parts = []
        for one, offset in zip(tensor.tensors, tensor.offsets, strict=True):
            for part in tensor.adapter.view(one, path, target=target).parts:
                ahead = len(offset) - len(part.box.shape)
                shape = (*(1 for _ in range(ahead)), *part.box.shape)
                parts.append(Part(Box(offset, shape), _ahead(part.memory, ahead)))
        return TensorView(tensor.dtype, tensor.shape, Placement.SHARDED, tuple(parts), None)

    def fingerprints(self, tensors: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Return what their frameworks tell of all tensors of each."""
        columns = [one.adapter.fingerprints(one.tensors) if one.tensors else () for one in tensors]
        return ([[list(column) for column in each] for each in columns], [one.offsets for one in tensors])

    def versions(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return the counters of all tensors of each."""
        return [list(one.adapter.versions(one.tensors)) for one in tensors]

    def convert(self, tensor: Any, buffers: Sequence[np.ndarray[Any, Any]], dtype: str) -> None:
        """Fill the tensors from host buffers of another dtype."""
        filled = [one for one in tensor.tensors if 0 not in one.shape]
        for one, buffer in zip(filled, buffers, strict=True):
            tensor.adapter.convert(one, [buffer.reshape(tuple(one.shape))], dtype)


def _ahead(memory: Memory, count: int) -> Memory:
    """Return memory with dimensions of length 1 before its own."""
    if not count:
        return memory
    if isinstance(memory, HostMemory):
        strides = (*(0 for _ in range(count)), *memory.strides)
        return HostMemory(memory.address, strides, memory.low, memory.nbytes, memory.owner)
    first = (0,) * count
    owner = memory.owner if memory.link is None else memory.owner[(None,) * count]
    return DeviceMemory(
        lambda dst: memory.copy_to_host(dst[first]),
        lambda src: memory.copy_from_host(src[first]),
        owner,
        memory.link,
    )


register(PartsAdapter())
