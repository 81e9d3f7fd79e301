"""MindSpore's tensors as the engine sees them: memory for the CPU's, copies for every other device's."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.experimental import MapParameter

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import TensorView
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import DeviceMemory, HostMemory, Memory, Part, Placement
from ckptengine.schema.path import Path, dotted

__all__ = [
    "as_tensor",
    "convert_tensor",
    "dtype_name",
    "fingerprints",
    "mindspore_dtype",
    "new_parameter",
    "view_tensor",
]

_NAMES = {
    getattr(ms, name): "bool" if name == "bool_" else name
    for name in (
        *("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2"),
    )
    if hasattr(ms, name)
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# What MindSpore's own numpy arrays can't hold, or only with a numpy of the version it was built with.
_BITS = {"bfloat16": (ms.int16, np.int16), "float8_e4m3fn": (ms.int8, np.int8), "float8_e5m2": (ms.int8, np.int8)}


def dtype_name(dtype: Any) -> str | None:
    """Return the logical name of a dtype, None where the format has none (`hifloat8`, `qint4x2`)."""
    return _NAMES.get(dtype)


def mindspore_dtype(name: str) -> Any:
    """Return the dtype of a logical name; raises `StateError` where this version of MindSpore has none."""
    if name not in _DTYPES:
        raise StateError(f"MindSpore {ms.__version__} has no dtype {name}; load without MindSpore, or with cast=True")
    return _DTYPES[name]


def view_tensor(tensor: Any, path: Path, *, target: bool) -> TensorView:
    """Return dtype, shape and memory of a tensor, after all work on it that MindSpore has under way.

    Raises `StateError` naming the path where it can't be saved, or with `target`, can't be filled in place.
    """
    name = _check(tensor, path)
    shape = tuple(tensor.shape)
    if tensor.size == 0:
        return TensorView(name, shape, Placement.REPLICATED, (), None)
    memory = _memory(tensor, name, path, target=target)
    identity: Hashable | None = None
    if isinstance(memory, HostMemory):
        identity = ("mindspore", memory.address, name, shape)
    return TensorView(name, shape, Placement.REPLICATED, (Part(Box.whole(shape), memory),), identity)


def fingerprints(tensors: Sequence[Any]) -> tuple[list[Any], ...]:
    """Return addresses, shapes, dtypes and whether the memory is without gaps, a list of each.

    MindSpore works asynchronously: asking for an address waits until what is to be written there is written. So these
    must be taken, by the training's own thread, for each snapshot.
    """
    return (
        [tensor.data_ptr() for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.is_contiguous() for tensor in tensors],
    )


def convert_tensor(tensor: Any, buffers: Sequence[np.ndarray[Any, Any]], dtype: str) -> None:
    """Fill a tensor from a host buffer of another dtype, as numpy's `astype` converts."""
    name = _check(tensor, ())
    for buffer in buffers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # overflow to inf is what a cast asks for
            converted = buffer.astype(DTYPES[name].numpy)
        _fill(tensor, name, converted)


def as_tensor(array: np.ndarray[Any, Any], name: str) -> Any:
    """Return a new tensor of a logical dtype with an array's bits; the array has the dtype's itemsize."""
    dtype = mindspore_dtype(name)
    if name not in _BITS:
        return Tensor(np.ascontiguousarray(array).reshape(array.shape))
    # No operator is run: not all devices have one for these types.
    tensor = Tensor(np.zeros(array.shape, np.float32), dtype)
    if array.size:
        _fill(tensor, name, array)
    return tensor


def new_parameter(name: str, shape: tuple[int, ...], called: str, grad: bool) -> Any:
    """Return a parameter of a logical dtype, given its own name and `requires_grad`, contents undefined."""
    dtype = mindspore_dtype(name)
    if name not in _BITS:
        return Parameter(Tensor(np.zeros(shape, DTYPES[name].numpy)), name=called, requires_grad=grad)
    parameter = Parameter(Tensor(np.zeros(shape, np.float32)), name=called, requires_grad=grad)
    parameter.set_dtype(dtype)  # through numpy it can't be made of these
    return parameter


def _check(tensor: Any, path: Path) -> str:
    if isinstance(tensor, MapParameter):
        raise StateError(f"{dotted(path)}: a MapParameter has no shape; save its keys and values (`export_data`)")
    name = dtype_name(tensor.dtype)
    if name is None:
        raise StateError(f"{dotted(path)}: tensors of dtype {tensor.dtype} can't be saved; convert it to another dtype")
    if any(not isinstance(length, int) or length < 0 for length in tensor.shape):
        raise StateError(f"{dotted(path)}: the tensor's shape {tensor.shape} is not known yet; run one step first")
    if tensor.has_init:
        tensor.init_data()  # parameters may be initialized as late as their first use
    return name


def _memory(tensor: Any, name: str, path: Path, *, target: bool) -> Memory:
    if target and not tensor.is_contiguous():
        raise StateError(f"{dotted(path)}: the tensor is a strided view, so it can't be filled; pass `contiguous()`")
    if not _on_cpu(tensor) or not tensor.is_contiguous():
        return _copied(tensor, name)
    itemsize = DTYPES[name].itemsize
    strides: list[int] = []
    nbytes = itemsize
    for length in reversed(tensor.shape):
        strides.insert(0, nbytes)
        nbytes *= length
    address = tensor.data_ptr()
    return HostMemory(address, tuple(strides), address, nbytes, tensor)


def _on_cpu(tensor: Any) -> bool:
    return str(tensor.device).upper().startswith("CPU")


def _copied(tensor: Any, name: str) -> DeviceMemory:
    """Return memory that MindSpore copies: another device's, or a strided view."""

    def copy_to_host(dst: np.ndarray[Any, Any]) -> None:
        _copy_to(tensor, name, dst)

    def copy_from_host(src: np.ndarray[Any, Any]) -> None:
        _fill(tensor, name, src)

    return DeviceMemory(copy_to_host, copy_from_host, tensor)


def _copy_to(tensor: Any, name: str, dst: np.ndarray[Any, Any]) -> None:
    if _on_cpu(tensor) and tensor.is_contiguous():
        dst[...] = _host_array(tensor, name)
        return
    source = tensor.contiguous()
    source = source.view(_BITS[name][0]) if name in _BITS else source
    dst[...] = source.asnumpy().view(dst.dtype)


def _fill(tensor: Any, name: str, src: np.ndarray[Any, Any]) -> None:
    if _on_cpu(tensor):
        _host_array(tensor, name)[...] = src.view(DTYPES[name].numpy)
    elif name in _BITS:
        bits, kind = _BITS[name]
        tensor.assign_value(Tensor(np.ascontiguousarray(src).view(kind), bits).view(tensor.dtype))
    else:
        tensor.assign_value(Tensor(np.ascontiguousarray(src).view(DTYPES[name].numpy)))


def _host_array(tensor: Any, name: str) -> np.ndarray[Any, Any]:
    """Return the memory of a contiguous tensor on the CPU, when what MindSpore has under way is done.

    It is good for as long as the tensor lives and nothing else is done with it.
    """
    dtype, shape = DTYPES[name].numpy, tuple(tensor.shape)
    memory = (ctypes.c_uint8 * (tensor.size * dtype.itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype).reshape(shape)
