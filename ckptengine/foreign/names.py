"""The closed list of names in pickles of torch: weights and plain values, and what each of them stands for."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptengine.foreign.unpickle import Names, Record, Unread, short
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.head import MAX_LEAF_NBYTES, MAX_NDIM
from ckptengine.state.classes import named_factory
from ckptengine.state.values import decode

__all__ = ["NAMES", "PLAIN", "VALUES", "Storage", "TensorRef", "dtype_name", "shape_of", "storage_of"]


_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of torch: its key in the file, the type that it is said to have (None: bytes), and its elements."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor: where it lies in a storage; `offset` and `stride` are in elements."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# torch/storage.py, _dtype_to_storage_type_map
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str | None


def storage_of(identity: Any) -> Storage:
    """Return the storage that a persistent id of `torch.save` names; raises ValueError for any other."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("it refers to something that is no storage of a tensor")
    _, kind, key, _, count = identity
    if not isinstance(kind, _StorageType) or type(key) is not str or not _is_count(count):
        raise ValueError("a storage of it is not described as torch does")
    return Storage(key, kind.dtype, count)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_LEAF_NBYTES


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> TensorRef:
    return _checked(storage, offset, size, stride, None, metadata)


def _tensor_of_dtype(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> TensorRef:
    return _checked(storage, offset, size, stride, dtype_name(dtype), metadata)


def _checked(storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None, metadata: Any) -> TensorRef:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise ValueError("a tensor has no dtype")
    if metadata:
        raise ValueError(f"a tensor is marked {short(metadata)}: resolve_conj() or resolve_neg() before it is saved")
    size, stride = shape_of(size), shape_of(stride)
    if len(size) != len(stride) or len(size) > MAX_NDIM or not _is_count(offset):
        raise ValueError(f"a tensor's shape {size} does not go with its strides {stride} and offset {short(offset)}")
    itemsize = DTYPES[dtype].itemsize
    held = storage.count * (1 if storage.dtype is None else DTYPES[storage.dtype].itemsize)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and (last + 1) * itemsize > held:
        raise ValueError(f"a tensor of shape {size}, strides {stride} and offset {offset} leaves its storage")
    return TensorRef(storage, dtype, offset, size, stride)


def dtype_name(value: Any) -> str:
    """Return the logical name of a dtype of torch, which is torch's own where that is imported; raises ValueError."""
    name = "" if isinstance(value, _CONTAINERS) else str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{short(value)} is no dtype that is read")
    return name


def shape_of(value: Any) -> tuple[int, ...]:
    """Return a shape, strides or offsets; raises ValueError where they are none."""
    if not isinstance(value, tuple | list) or not all(map(_is_count, value)):
        raise ValueError(f"{short(value)} is no shape")
    return tuple(value)


def _parameter(data: Any, requires_grad: Any = False, hooks: Any = None, state: Any = None) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise ValueError("a parameter has no tensor")
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, or of a class made from Tensor."""
    if not isinstance(kind, _TensorType):
        raise ValueError("a tensor is of a class of its own")
    if not callable(getattr(function, "make", None)) or not isinstance(arguments, tuple):
        raise ValueError("a tensor is not described as torch does")
    return function.make(*arguments)


@dataclass(frozen=True, slots=True)
class _TensorType:
    """The class of a tensor that is plain, or a parameter."""

    name: str


def _bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not written as pickle does")
    return text.encode("latin-1")


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(items)


def _scalar(dtype: Any, data: Any) -> Any:
    """`numpy._core.multiarray.scalar`."""
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise ValueError("a numpy scalar is not written as numpy does")
    return np.frombuffer(data, dtype)[0]


def _numpy_dtype(text: Any, *_: Any) -> np.dtype[Any] | Unread:
    if type(text) is not str:
        raise ValueError(f"a {type(text).__name__} is no dtype of numpy")
    return np.dtype(text) if text in _NUMPY else Unread(f"numpy.dtype({text[:40]!r})")


_NUMPY = frozenset(("b1", "?", *(f"{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8)), "f2", "f4", "f8", "c8", "c16"))


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    return complex(float(real), float(imaginary))


def _framework(kind: str) -> Callable[..., Any]:
    def make(payload: Any, index: Any = None) -> Any:
        if kind == "size":
            return decode({"$torch.size": list(shape_of(payload))})
        if type(payload) is not str:
            raise ValueError(f"{short(payload)} is no device")
        return decode({"$torch.device": payload if index is None else f"{payload}:{int(index)}"})

    return make


def _default_dict(factory: Any = None, *_: Any) -> Any:
    name = getattr(factory, "text", "")
    return defaultdict(None if factory is None else named_factory(name.removeprefix("builtins.")))


def _of(kind: type) -> Callable[..., Any]:
    def make(*items: Any) -> Any:
        if len(items) > 1 or any(isinstance(item, Record) or not hasattr(item, "__iter__") for item in items):
            raise ValueError(f"a {kind.__name__} is made of something else than items")
        return kind(*items)

    return make


def _number(kind: type) -> Callable[..., Any]:
    def make(*value: Any) -> Any:
        if len(value) > 1 or any(type(item) not in (int, float, bool) for item in value):
            raise ValueError(f"a {kind.__name__} is made of something else than a number")
        return kind(*value)

    return make


PLAIN: Names = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _of(Counter),
    "collections.deque": lambda items=(), most=None: deque(items, most),
    "collections.defaultdict": _default_dict,
    "builtins.set": _of(set),
    "builtins.frozenset": _of(frozenset),
    "builtins.bytearray": lambda *items: bytearray(b"".join(item for item in items if isinstance(item, bytes))),
    "builtins.list": _of(list),
    "builtins.dict": _of(dict),
    "builtins.tuple": _of(tuple),
    "builtins.int": _number(int),
    "builtins.float": _number(float),
    "builtins.complex": _complex,
    "_codecs.encode": _bytes,
    "torch.Size": _framework("size"),
    "torch.device": _framework("device"),
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}

NAMES: Names = {
    **PLAIN,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": lambda storage, offset, size, stride: _tensor(storage, offset, size, stride),
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: _parameter(data),
    "torch._tensor._rebuild_from_type_v2": _from_type,
}

VALUES: Names = {
    **{f"torch.{name}": (lambda dtype=dtype: _StorageType(dtype)) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": lambda: _StorageType(None),
    **{f"torch.{name}": (lambda name=name: decode({"$torch.dtype": name})) for name in DTYPES},
    **{
        name: (lambda name=name: _TensorType(name))
        for name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
    },
}
