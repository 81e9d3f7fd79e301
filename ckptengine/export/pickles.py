"""Pickles of plain values, tensors and records, as other libraries read them; no object of ours is ever in one.

Source: Python's pickletools (protocol 2, which `torch.save` writes) and torch/_utils.py.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptengine.errors import ForeignFormatError
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.values import encode

__all__ = ["Call", "Global", "Names", "Record", "Storage", "pickled"]

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
}
_BATCH = 1000  # items between two marks, as pickle has them


@dataclass(frozen=True, slots=True)
class Storage:
    """A tensor that has a storage of its own: the key of that, dtype and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, by module and name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function makes of arguments."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """An instance of a class, made without its `__init__`, with a state."""

    kind: Global
    state: Any


@dataclass(slots=True)
class Names:
    """What was pickled already, so that it is one object again: the memo."""

    numbers: dict[object, int] = field(default_factory=dict)


def pickled(value: Any, names: Names | None = None) -> bytes:
    """Return a pickle of nested dicts, lists, plain values, `Storage` for tensors, and records.

    Raises `ForeignFormatError` naming the path of what can't be written.
    """
    out = bytearray(b"\x80\x02")
    _Writer(out, names or Names()).write(value, ())
    out += b"."
    return bytes(out)


class _Writer:
    """Writes one pickle."""

    def __init__(self, out: bytearray, names: Names) -> None:
        self._out, self._names = out, names

    def write(self, value: Any, path: Path) -> None:
        out = self._out
        kind = type(value)
        if value is None:
            out += b"N"
        elif kind is bool:
            out += b"\x88" if value else b"\x89"
        elif kind is int:
            self._int(value)
        elif kind is float:
            out += b"G" + struct.pack(">d", value)
        elif kind is str:
            self._text(value)
        elif kind is bytes:
            self.write(Call(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")), path)
        elif kind is tuple:
            self._tuple(value, path)
        elif kind is list:
            out += b"]"
            self._items(value, path)
        elif kind is dict:
            out += b"}"
            self._pairs(value, path)
        elif kind is Global:
            self._global(value)
        elif kind is Call:
            self._global(value.function)
            self._tuple(value.arguments, path)
            out += b"R"
        elif kind is Record:
            self._global(value.kind)
            out += b")\x81"
            self.write(value.state, path)
            out += b"b"
        elif kind is Storage:
            self._tensor(value)
        else:
            self._other(value, path)

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + bytes([value])
        elif -(2**31) <= value < 2**31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._out += (
                b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))
            ) + data

    def _text(self, value: str) -> None:
        if self._known(("text", value)):
            return
        data = value.encode("utf-8", "surrogatepass")
        self._out += b"X" + struct.pack("<I", len(data)) + data
        self._remember(("text", value))

    def _known(self, key: object) -> bool:
        number = self._names.numbers.get(key)
        if number is None:
            return False
        self._out += b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
        return True

    def _remember(self, key: object) -> None:
        number = self._names.numbers[key] = len(self._names.numbers)
        self._out += b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def _global(self, one: Global) -> None:
        if not self._known(one):
            self._out += b"c" + one.module.encode() + b"\n" + one.name.encode() + b"\n"
            self._remember(one)

    def _tuple(self, value: tuple[Any, ...], path: Path) -> None:
        if not value:
            self._out += b")"
            return
        self._out += b"(" if len(value) > 3 else b""
        for number, item in enumerate(value):
            self.write(item, (*path, number))
        self._out += b"t" if len(value) > 3 else (b"\x85", b"\x86", b"\x87")[len(value) - 1]

    def _items(self, value: Any, path: Path) -> None:
        items = list(enumerate(value))
        for begin in range(0, len(items), _BATCH):
            self._out += b"("
            for number, item in items[begin : begin + _BATCH]:
                self.write(item, (*path, number))
            self._out += b"e"

    def _pairs(self, value: Mapping[Any, Any], path: Path) -> None:
        pairs = list(value.items())
        for begin in range(0, len(pairs), _BATCH):
            self._out += b"("
            for key, item in pairs[begin : begin + _BATCH]:
                self.write(key, path)
                self.write(item, (*path, key if type(key) in (str, int) else repr(key)))
            self._out += b"u"

    def _tensor(self, one: Storage) -> None:
        """As `torch._tensor.Tensor._reduce_ex_internal` has it."""
        if self._known(("tensor", one.key)):  # tied: the same tensor
            return
        count = math.prod(one.shape)
        typed = one.dtype in _STORAGES
        kind = Global("torch", _STORAGES[one.dtype]) if typed else Global("torch.storage", "UntypedStorage")
        held = count if typed else count * DTYPES[one.dtype].itemsize
        self._global(Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self._out += b"("
        self._tuple(("storage", kind, one.key, "cpu", held), ())
        self._out += b"Q"
        strides = tuple(math.prod(max(1, n) for n in one.shape[dim + 1 :]) for dim in range(len(one.shape)))
        hooks = Call(Global("collections", "OrderedDict"), ())
        rest = (0, one.shape, strides, False, hooks)
        for item in rest if typed else (*rest, Global("torch", one.dtype)):
            self.write(item, ())
        self._out += b"tR"
        self._remember(("tensor", one.key))

    def _other(self, value: Any, path: Path) -> None:
        """What `collections`, numpy and torch have."""
        kind = type(value)
        text = {"path": dotted(path), "kind": describe_type(value)}
        if kind is OrderedDict:
            self.write(Call(Global("collections", "OrderedDict"), ()), path)
            self._pairs(value, path)
        elif kind is Counter:
            self.write(Call(Global("collections", "Counter"), (dict(value),)), path)
        elif kind is deque:
            self.write(Call(Global("collections", "deque"), (list(value), value.maxlen)), path)
        elif kind is defaultdict and value.default_factory in (list, dict, int, float, str, set, tuple, None):
            factory = value.default_factory
            arguments = () if factory is None else (Global("builtins", factory.__name__),)
            self.write(Call(Global("collections", "defaultdict"), arguments), path)
            self._pairs(value, path)
        elif kind in (set, frozenset):
            self.write(Call(Global("builtins", kind.__name__), (list(value),)), path)
        elif kind is complex:
            self.write(Call(Global("builtins", "complex"), (value.real, value.imag)), path)
        elif isinstance(value, np.generic) and value.dtype.kind in "iufb":
            self.write(value.item(), path)
        else:
            self._framework(value, path, text)

    def _framework(self, value: Any, path: Path, text: Mapping[str, str]) -> None:
        document: Any = encode(value, path)
        tag, payload = "", document
        if isinstance(document, dict) and len(document) == 1:
            tag, payload = next(iter(document.items()))
        if tag == "$torch.size":
            self.write(Call(Global("torch", "Size"), (tuple(payload),)), path)
        elif tag == "$torch.dtype":
            self._global(Global("torch", payload))
        elif tag == "$torch.device":
            device, _, number = payload.partition(":")
            self.write(Call(Global("torch", "device"), (device, int(number)) if number else (device,)), path)
        else:
            raise ForeignFormatError(
                f"{text['path']}: {text['kind']} can't be written so that torch.load(weights_only=True) reads it; "
                "leave it out with `only`"
            )
