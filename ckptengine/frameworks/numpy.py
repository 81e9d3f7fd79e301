"""numpy arrays as tensors, and the geometry of strided memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.frameworks.adapter import Adapter, TensorKind, TensorView
from ckptengine.frameworks.numpy_random import NumpyStream
from ckptengine.frameworks.random_stream import RandomStream
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES, name_of_numpy_dtype
from ckptengine.schema.leaf import HostMemory, Part, Placement
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import find_class, full_name

__all__ = ["NumpyAdapter", "may_overlap"]


def may_overlap(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether two elements of a strided array may share a byte.

    Takes lengths in elements and strides in bytes. Slices, transposes and reversals of an array are never
    said to overlap; some layouts that only `as_strided` makes are, though they don't.
    """
    if 0 in shape:
        return False
    extent = itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent += (length - 1) * stride
    return False


class NumpyAdapter(Adapter):
    """Arrays of numpy and of ml_dtypes."""

    name = "numpy"

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is an array."""
        return isinstance(value, np.ndarray)

    def view(self, tensor: Any, path: Path, *, target: bool) -> TensorView:
        """Return the array as one whole box."""
        array: np.ndarray[Any, Any] = tensor
        name = name_of_numpy_dtype(array.dtype)
        if isinstance(array, np.ma.MaskedArray):
            raise StateError(f"{dotted(path)}: a masked array would lose its mask; save `.data` and `.mask`")
        if name is None:
            raise StateError(
                f"{dotted(path)}: arrays of dtype {array.dtype} can't be saved; convert to one of "
                "numpy's number types, or to a list of plain values"
            )
        if not array.dtype.isnative:
            raise StateError(
                f"{dotted(path)}: the array's byte order is foreign ({array.dtype.str}); convert it with "
                "`array.astype(array.dtype.newbyteorder('='))`"
            )
        if target and not array.flags.writeable:
            raise StateError(f"{dotted(path)}: the array is read-only, so it can't be filled; pass a writable copy")
        # A read-only one is replaced when it is loaded; one that can be written to would have to be filled.
        if array.flags.writeable and may_overlap(array.shape, array.strides, array.itemsize):
            raise StateError(f"{dotted(path)}: the array's elements share memory, so it can't be filled; pass a copy")
        memory = _memory(array)
        parts = (Part(Box.whole(array.shape), memory),) if array.size else ()
        identity = (memory.address, name, array.shape, array.strides) if array.size else None
        return TensorView(name, array.shape, Placement.REPLICATED, parts, identity)

    def part_of(self, tensor: Any, box: Box) -> Any:
        """Return a view of a box."""
        return tensor[tuple(slice(start, start + n) for start, n in zip(box.offset, box.shape, strict=True))]

    def fingerprints(self, tensors: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Return addresses, shapes, strides and dtypes."""
        interfaces = [array.__array_interface__ for array in tensors]
        return (
            [interface["data"] for interface in interfaces],
            [array.shape for array in tensors],
            [array.strides for array in tensors],
            [array.dtype for array in tensors],
        )

    def empty(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Return a new array."""
        return np.empty(shape, DTYPES[dtype].numpy)

    def new_like(self, tensor: Any, order: tuple[int, ...] | None) -> np.ndarray[Any, Any]:
        """Return a new array whose dimensions lie in memory in an order."""
        order = order or tuple(range(tensor.ndim))
        return np.empty([tensor.shape[dim] for dim in order], tensor.dtype).transpose(np.argsort(order))

    def tensor_kind(self, tensor: Any) -> TensorKind:
        """Return the class of a subclass; a memory map is an array, wherever its bytes come from."""
        kind = type(tensor)
        if kind in (np.ndarray, np.memmap):
            return None
        made = getattr(np.asarray(tensor).view(kind), "__dict__", {})
        attributes = [key for key, one in getattr(tensor, "__dict__", {}).items() if made.get(key, made) is not one]
        told = {"class": full_name(kind)}
        return {**told, "attributes": attributes} if attributes else told

    def as_kind(self, tensor: Any, kind: TensorKind, path: Path) -> np.ndarray[Any, Any]:
        """Return an array's memory as a subclass that is imported."""
        base: np.ndarray[Any, Any] = tensor.view(np.ndarray)
        if not isinstance(kind, dict):
            return base
        cls = find_class(str(kind.get("class")))
        if cls is None or not issubclass(cls, np.ndarray) or kind.get("attributes"):
            raise LoadMismatchError(
                f"{dotted(path)}: is a {kind.get('class')} in the checkpoint, which can't be made here; import that "
                "class before the load, or put one into the state, which is then filled"
            )
        return base.view(cls)

    def convert(self, tensor: Any, buffers: Sequence[np.ndarray[Any, Any]], dtype: str) -> None:
        """Fill an array from a buffer of another dtype, as `astype` converts."""
        for buffer in buffers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # overflow to inf is what a cast asks for
                np.copyto(tensor, buffer, casting="unsafe")

    def replacement(self, tensor: Any) -> np.ndarray[Any, Any] | None:
        """Return a new array in place of a read-only one."""
        return None if tensor.flags.writeable else np.empty(tensor.shape, tensor.dtype)

    def random_streams(self) -> dict[str, RandomStream]:
        """Return the stream that `np.random.seed` seeds, as `numpy`."""
        return {"numpy": NumpyStream()}

    def random_stream_of(self, generator: Any) -> RandomStream | None:
        """Return the stream of a Generator, a RandomState or a bit generator."""
        kinds = (np.random.Generator, np.random.RandomState, np.random.BitGenerator)
        return NumpyStream(generator) if isinstance(generator, kinds) else None


def _memory(array: np.ndarray[Any, Any]) -> HostMemory:
    address: int = array.__array_interface__["data"][0]
    spans = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if n]
    low = address + sum(span for span in spans if span < 0)
    high = address + sum(span for span in spans if span > 0) + array.itemsize
    return HostMemory(address, array.strides, low, high - low, array)
