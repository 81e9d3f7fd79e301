"""torch tensors as the engine sees them: memory for the CPU's, copies for every other device's."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.frameworks.adapter import TensorView
from ckptengine.frameworks.numpy import may_overlap
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import DeviceMemory, HostMemory, Memory, Part, Placement
from ckptengine.schema.path import Path, dotted
from ckptengine.torch.accelerator import BITS, Link, bits_of
from ckptengine.torch.dtensor import dtensor_pieces, is_dtensor
from ckptengine.torch.emptied import refuse_emptied
from ckptengine.torch.flat import FlatPart, flat_pieces, is_flat

__all__ = [
    "aliases",
    "convert_tensor",
    "dtype_name",
    "fingerprints",
    "new_like",
    "tensor_of",
    "torch_dtype",
    "view_tensor",
]

# As what bits are compared: a type without NaN, of the same size or half of it.
_COMPARED = {bits: torch.int64 if bits is torch.complex128 else bits for _, bits in BITS.values()}


# Subclasses of which torch's own calls on tensors fail with errors of their own.
_OWN_FORMS = {
    "MaskedTensor": "is more than its data; put `get_data()` and `get_mask()` into the state",
    "ShardedTensorBase": "is torch's old form of a sharded tensor; use a DTensor, or ckptengine.ShardedArray(local, "
    "global_shape, offset) for each local shard",
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the logical name of a dtype, `float32`."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a logical name; raises `StateError` where this version of torch has none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"torch {torch.__version__} has no dtype {name}; install a newer one or load without torch")
    return dtype


def view_tensor(tensor: torch.Tensor, path: Path, *, target: bool) -> TensorView:
    """Return dtype, global shape, placement and this rank's parts of a tensor.

    Raises `StateError` naming the path where it can't be saved, or with `target`, can't be filled in place.
    """
    name = _check(tensor, path)
    shape, placement, pieces = _pieces(tensor, path)
    order = tensor.order if isinstance(tensor, FlatPart) else None
    parts = tuple(Part(box, _memory(piece, path, target=target), order) for box, piece in pieces)
    return TensorView(name, shape, placement, parts, _identity(tensor, name))


def fingerprints(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    """Return addresses, shapes, strides and dtypes of what this rank holds, a list of each.

    A DTensor's placement never changes, its local tensor's memory may.
    """
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None:
        kind = distributed.DTensor
        tensors = [tensor._local_tensor if isinstance(tensor, kind) else tensor for tensor in tensors]
    return (
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(torch.Tensor.size, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        [tensor.dtype for tensor in tensors],
    )


def aliases(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return for each tensor another over the same memory of this rank, which stays whatever becomes of the first."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None:
        kind = distributed.DTensor
        tensors = [tensor._local_tensor if isinstance(tensor, kind) else tensor for tensor in tensors]
    return list(map(torch.Tensor.detach, tensors))


def new_like(tensor: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    """Return an empty tensor of the same dtype, shape and device, its dimensions in memory in an order (None: C).

    A DTensor gives one on the same mesh with the same placements.
    """
    if isinstance(tensor, FlatPart):  # elements of a run have one order
        return tensor.like(torch.empty_like(tensor.run))
    order = tuple(range(tensor.ndim)) if order is None else order
    inverse = [order.index(dim) for dim in range(tensor.ndim)]
    if is_dtensor(tensor):
        distributed: Any = tensor
        local = new_like(distributed._local_tensor.detach(), order)
        lengths = [tensor.shape[dim] for dim in order]
        stride = torch.empty(lengths, device="meta").permute(inverse).stride()
        return type(distributed).from_local(  # type: ignore[no-any-return]
            local,
            distributed.device_mesh,
            distributed.placements,
            run_check=False,
            shape=tensor.shape,
            stride=stride,
        )
    lengths = [tensor.shape[dim] for dim in order]
    return torch.empty(lengths, dtype=tensor.dtype, device=tensor.device).permute(inverse)


def convert_tensor(tensor: torch.Tensor, buffers: Sequence[np.ndarray[Any, Any]], dtype: str) -> None:
    """Fill a tensor from host buffers that hold another dtype's bits, one for each of its parts."""
    _, _, pieces = _pieces(tensor, ())
    with torch.no_grad():
        for (_, piece), buffer in zip(pieces, buffers, strict=True):
            piece.copy_(bits_of(buffer).view(torch_dtype(dtype)))


def tensor_of(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """Return an array's memory as a tensor of a logical dtype."""
    return bits_of(array).view(torch_dtype(dtype))


def _check(tensor: torch.Tensor, path: Path) -> str:
    where, what = dotted(path), type(tensor).__name__
    for kind in type(tensor).__mro__:
        if kind.__name__ in _OWN_FORMS:
            raise StateError(f"{where}: {what} {_OWN_FORMS[kind.__name__]}")
    refuse_emptied(tensor, path)
    if torch.nn.parameter.is_lazy(tensor):
        raise StateError(f"{where}: {what} has no shape yet; run one forward pass first")
    if tensor.is_nested:
        raise StateError(
            f"{where}: a nested tensor ({what}); put its parts into the state (`unbind()`, or `values()` and "
            "`offsets()`), and make it of them after the load"
        )
    if tensor.is_quantized:
        raise StateError(
            f"{where}: quantized tensor ({tensor.dtype}); put `int_repr()`, its scales and its zero points into the "
            "state, and make it of them after the load (of a library's module, in an object with `state_dict` and "
            "`load_state_dict`)"
        )
    if tensor.layout is not torch.strided:
        raise StateError(
            f"{where}: tensor with layout {tensor.layout}; put its `values()` and `indices()` into the state, or "
            "`to_dense()`, and make it of them after the load"
        )
    if tensor.is_meta or (tensor.device.type == "cpu" and tensor.untyped_storage().device.type == "meta"):
        raise StateError(
            f"{where}: tensor on the meta device has no memory; materialize the model first "
            "(`model.to_empty(device=…)`, then the load, and then give buffers that are not persistent their values), "
            "or, where a library has offloaded it (`device_map`), load it without that"
        )
    if not is_dtensor(tensor):
        try:
            tensor.untyped_storage().data_ptr()
        except RuntimeError as error:
            raise StateError(
                f"{where}: {what} has no memory of its own; put the tensors that it is made of into the state, and "
                "make it of them after the load"
            ) from error
    name = dtype_name(tensor.dtype)
    if name not in DTYPES:
        raise StateError(f"{where}: tensors of dtype {tensor.dtype} can't be saved; convert it to another dtype")
    return name


def _pieces(tensor: torch.Tensor, path: Path) -> tuple[tuple[int, ...], Placement, list[tuple[Box, torch.Tensor]]]:
    if isinstance(tensor, FlatPart):
        return flat_pieces(tensor)
    if is_dtensor(tensor):
        return dtensor_pieces(tensor, path)
    shape = tuple(tensor.shape)
    return shape, Placement.REPLICATED, [(Box.whole(shape), tensor.detach())] if tensor.numel() else []


def _identity(tensor: torch.Tensor, name: str) -> Hashable | None:
    """A DTensor's is the object, since ranks with an empty part have no address to compare."""
    if is_dtensor(tensor) or is_flat(tensor):
        return ("torch", id(tensor))
    if tensor.numel() == 0:
        return None
    strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
    lazy = (tensor.is_conj(), tensor.is_neg())
    identity = (tensor.data_ptr(), name, tuple(tensor.shape), strides)
    return identity if tensor.device.type == "cpu" and lazy == (False, False) else (*identity, tensor.device, lazy)


def _memory(piece: torch.Tensor, path: Path, *, target: bool) -> Memory:
    lazy = piece.is_conj() or piece.is_neg()
    base = _without_repeats(piece)
    strides = tuple(stride * piece.element_size() for stride in base.stride())
    if may_overlap(base.shape, strides, piece.element_size()):
        raise StateError(
            f"{dotted(path)}: elements of the tensor share memory (it is a view of overlapping windows), so it "
            "can't be filled; put a clone into the state, or the tensor that it is a view of"
        )
    strides = tuple(stride * piece.element_size() for stride in piece.stride())
    storage = piece.untyped_storage()
    span = sum((length - 1) * stride for length, stride in zip(piece.shape, strides, strict=True))
    begin, nbytes = int(piece.storage_offset()) * piece.element_size(), storage.nbytes()
    if not 0 <= begin <= begin + span + piece.element_size() <= nbytes:
        raise StateError(
            f"{dotted(path)}: the tensor's memory was freed or resized (its storage has {nbytes} bytes); "
            "save between two steps, not inside forward or backward"
        )
    if lazy or piece.device.type != "cpu" or (target and base is not piece):
        return _copied(piece, base, path)
    low = storage.data_ptr()
    return HostMemory(low + begin, strides, low, nbytes, piece)


def _without_repeats(piece: torch.Tensor) -> torch.Tensor:
    """Return an expanded tensor with its first element only along the dimensions in which it repeats itself."""
    for dim, (length, stride) in enumerate(zip(piece.shape, piece.stride(), strict=True)):
        if length > 1 and stride == 0:
            piece = piece.narrow(dim, 0, 1)
    return piece


def _copied(piece: torch.Tensor, base: torch.Tensor, path: Path) -> DeviceMemory:
    """Return memory that torch copies: another device's, a view whose conjugation is still to be done, or one that
    repeats its elements, of which `base` has each once."""
    bits = BITS[piece.element_size()][1]

    def copy_to_host(dst: np.ndarray[Any, Any]) -> None:
        # torch's copies on the CPU expect elements at multiples of their size; small entries of an image are packed.
        aligned = dst if dst.ctypes.data % dst.itemsize == 0 else np.empty(dst.shape, dst.dtype)
        with torch.no_grad():
            bits_of(aligned).copy_(piece.resolve_conj().resolve_neg().view(bits))
        if aligned is not dst:
            dst[...] = aligned

    def copy_from_host(src: np.ndarray[Any, Any]) -> None:
        source = bits_of(src)
        if base is not piece:
            once = source[tuple(map(slice, base.shape))]
            if not torch.equal(once.expand_as(source).view(_COMPARED[bits]), source.view(_COMPARED[bits])):
                raise LoadMismatchError(
                    f"{dotted(path)}: the tensor repeats its elements (it is expanded, and they share memory), the "
                    "checkpoint has different ones; put a clone into the state"
                )
            source = once
        with torch.no_grad():
            if piece.is_conj() or piece.is_neg():
                base.copy_(source.view(piece.dtype))
            else:
                base.view(bits).copy_(source)

    beside = piece.device.type != "cpu" and base is piece and not piece.is_conj() and not piece.is_neg()
    return DeviceMemory(copy_to_host, copy_from_host, piece, Link.to(piece.device) if beside else None, beside)
