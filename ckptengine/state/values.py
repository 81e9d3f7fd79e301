"""Plain values as typed JSON, exactly: what is decoded equals what was encoded, type for type, bit for bit.

JSON's own types stand for themselves: null, booleans, integers below 2**53, finite floats, strings, arrays
(lists) and objects (dicts whose keys are strings that don't start with `$`). Everything else is an object
with one key:

| tag | payload |
|---|---|
| `$int` | hexadecimal text, for integers that not every JSON reader keeps |
| `$float` | `nan`, `inf`, `-inf`, or the 16 hexadecimal digits of another NaN |
| `$complex` | real and imaginary part |
| `$str` | base64 of UTF-8 with surrogates, for strings with lone surrogates |
| `$bytes` | base64 |
| `$tuple` | the items |
| `$dict`, `$counter`, `$ordered` | pairs of key and value: any other dict, `Counter`, `OrderedDict` |
| `$numpy` | a numpy scalar: dtype name, hexadecimal little-endian bytes |
| `$dtype` | a numpy dtype: its name, or its type string |
| `$torch.dtype`, `$torch.size`, `$torch.device` | name; list of lengths; text (other frameworks likewise) |

and those of `ckptengine.state.classes`.

A framework's tag gives the framework's object where that framework is imported; elsewhere a dtype or a device
gives its text (`"torch.float32"`) and a size gives a tuple.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointDamagedError, StateError
from ckptengine.frameworks.registry import adapters
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.classes import CLASS_TAGS, decode_class, encode_class
from ckptengine.state.refusal import Refusal

__all__ = ["MAX_DEPTH", "decode", "digest", "encode"]

MAX_DEPTH = 100
"""Nesting beyond this is refused, in both directions, so that no checkpoint can exhaust the stack."""

_EXACT_INT = 2**53  # the integers that a reader with only doubles keeps
_CANONICAL_NAN = struct.pack(">d", math.nan)
_HEX_INT = re.compile(r"-?0x[0-9a-f]+")
_FRAMEWORK_TAG = re.compile(r"\$([a-z]+)\.(dtype|size|device)")
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"$dict": dict, "$counter": Counter, "$ordered": OrderedDict}


def encode(value: Any, path: Path) -> Any:
    """Return a plain value as typed JSON.

    Takes the value and its path (for messages). Raises `StateError` naming path and type where the value
    holds something that could not be given back exactly.
    """
    return _encode(value, path, 0)


def _encode(value: Any, path: Path, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise StateError(f"{dotted(path)}: nested more than {MAX_DEPTH} deep (or inside itself); flatten it")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -_EXACT_INT < value < _EXACT_INT else {"$int": hex(value)}
    if kind is float:
        return _encode_float(value)
    if kind is str:
        return _encode_str(value)
    if kind is list:
        return [_encode(item, (*path, i), depth + 1) for i, item in enumerate(value)]
    if kind is dict:
        return _encode_dict(value, path, depth)
    if kind is tuple:
        return {"$tuple": [_encode(item, (*path, i), depth + 1) for i, item in enumerate(value)]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [_encode_float(value.real), _encode_float(value.imag)]}
    if kind is Counter:
        return {"$counter": _encode_pairs(value, path, depth)}
    if kind is OrderedDict:
        return {"$ordered": _encode_pairs(value, path, depth)}
    if isinstance(value, np.generic):
        return _encode_numpy_scalar(value, path)
    if isinstance(value, np.dtype):
        return _encode_numpy_dtype(value, path)
    for adapter in adapters():
        tagged = adapter.encode_value(value)
        if tagged is not None:
            return {f"${adapter.name}.{tagged[0]}": tagged[1]}
    told = encode_class(value, path, lambda item, where: _encode(item, where, depth + 1))
    if told is not None:
        return told
    if isinstance(value, Refusal):
        raise StateError(f"{dotted(path)}: {value.reason}")
    raise StateError(f"{dotted(path)}: {describe_type(value)} can't be saved. {_advice(value)}")


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return {"$float": "inf" if value > 0 else "-inf"}
    bits = struct.pack(">d", value)
    return {"$float": "nan" if bits == _CANONICAL_NAN else bits.hex()}


def _encode_str(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"$str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()}
    return value


def _encode_dict(value: dict[Any, Any], path: Path, depth: int) -> Any:
    for key in value:
        if type(key) is not str or key.startswith("$") or not isinstance(_encode_str(key), str):
            return {"$dict": _encode_pairs(value, path, depth)}
    return {key: _encode(item, (*path, key), depth + 1) for key, item in value.items()}


def _encode_pairs(value: dict[Any, Any], path: Path, depth: int) -> list[list[Any]]:
    return [
        [_encode(key, (*path, f"<key {key!r}>"), depth + 1), _encode(item, (*path, str(key)), depth + 1)]
        for key, item in value.items()
    ]


def _encode_numpy_scalar(value: np.generic[Any], path: Path) -> Any:
    dtype = value.dtype
    stored = DTYPES.get(dtype.name)
    if stored is None or stored.numpy != dtype or type(value) is not dtype.type:
        raise StateError(
            f"{dotted(path)}: {describe_type(value)} can't be saved exactly on every machine; convert it to "
            "a Python value, a string or an integer"
        )
    return {"$numpy": [dtype.name, _little(np.asarray(value)).tobytes().hex()]}


def _encode_numpy_dtype(value: np.dtype[Any], path: Path) -> Any:
    stored = DTYPES.get(value.name)
    if stored is not None and stored.numpy == value and value.metadata is None:
        return {"$dtype": value.name}
    extended = value.itemsize > {"f": 8, "c": 16}.get(value.kind, value.itemsize)  # no two machines' are alike
    simple = value.fields is None and value.subdtype is None and value.kind in "biufcSUMm"
    if simple and not extended and value.metadata is None:
        return {"$dtype": value.str}
    raise StateError(f"{dotted(path)}: numpy dtype {value!r} can't be saved; save its description (`dtype.descr`)")


def _little(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array with little-endian bytes; ml_dtypes' have no byte order of numpy's to change."""
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.kind in "iufc" else array


def _advice(value: Any) -> str:
    if isinstance(value, random.Random) or any(a.random_stream_of(value) is not None for a in adapters()):
        return (
            "Random streams go into ckptengine.RNG: `ckptengine.RNG({'name': generator})` in the state, which "
            "holds the process's own streams too."
        )
    if isinstance(value, tuple):
        return "Convert it to a plain tuple: `tuple(value)`."
    if isinstance(value, dict):
        return "Convert it to a plain dict: `dict(value)`."
    if isinstance(value, (bytearray, memoryview)):
        return "Convert it to bytes, or to a numpy array."
    if isinstance(value, (bool, int, float, complex, str, bytes, list)):
        base = next(b.__name__ for b in type(value).__mro__ if b in (int, float, complex, str, bytes, list))
        return f"Its type would be lost: convert it with `{base}(value)`, or save its name."
    if callable(value):
        return (
            "Code isn't saved: save its name or its arguments, and build it again before loading (torch's schedulers "
            "leave out plain functions and lambdas; of other callables they save the attributes)."
        )
    return (
        "Give the object `state_dict()` and `load_state_dict()` (a library's: in a class of your own around it), or "
        "convert it to numbers, strings, lists, dicts, arrays or tensors."
    )


def decode(data: Any) -> Any:
    """Return the plain value that typed JSON stands for.

    Takes what `json.loads` gave. Raises `CheckpointDamagedError` where that is nothing that `encode` returns.
    """
    return _decode(data, 0)


def _decode(data: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CheckpointDamagedError(f"a plain value is nested more than {MAX_DEPTH} deep")
    kind = type(data)
    if data is None or kind in (bool, int, str):
        return data
    if kind is float:
        if math.isfinite(data):
            return data
        raise CheckpointDamagedError("a plain value holds a number that is not finite and has no tag")
    if kind is list:
        return [_decode(item, depth + 1) for item in data]
    if kind is not dict:
        raise CheckpointDamagedError(f"a plain value holds {kind.__name__}, which is not JSON")
    tag = next(iter(data), "")
    if len(data) == 1 and isinstance(tag, str) and tag.startswith("$"):
        return _decode_tagged(tag, data[tag], depth)
    if any(type(key) is not str or key.startswith("$") for key in data):
        raise CheckpointDamagedError(f"a plain value holds an object with misplaced tags: {_short(data)}")
    return {key: _decode(item, depth + 1) for key, item in data.items()}


def _decode_tagged(tag: str, payload: Any, depth: int) -> Any:
    if tag in CLASS_TAGS:
        try:
            return decode_class(tag, payload, lambda item: _decode(item, depth + 1))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointDamagedError(f"a plain value's {tag} is invalid: {_short(payload)}") from error
    if tag in _MAPPINGS:
        return _decode_pairs(tag, payload, depth)
    if tag == "$tuple":
        return tuple(_decode(item, depth + 1) for item in _expect(tag, payload, list))
    decoder = _DECODERS.get(tag) or _framework_decoder(tag)
    if decoder is None:
        raise CheckpointDamagedError(
            f"a plain value has the unknown tag {_short(tag)}: a newer ckptengine wrote it (install that), or it is "
            "damaged"
        )
    try:
        return decoder(payload)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, struct.error) as error:
        raise CheckpointDamagedError(f"a plain value's {tag} is invalid: {_short(payload)}") from error


def _decode_pairs(tag: str, payload: Any, depth: int) -> Any:
    result = _MAPPINGS[tag]()
    for pair in _expect(tag, payload, list):
        if type(pair) is not list or len(pair) != 2:
            raise CheckpointDamagedError(f"a plain value's {tag} holds something that is not a pair: {_short(pair)}")
        key, item = _decode(pair[0], depth + 1), _decode(pair[1], depth + 1)
        try:
            repeated = key in result
            result[key] = item
        except TypeError as error:
            raise CheckpointDamagedError(f"a plain value's {tag} has an impossible key: {_short(pair[0])}") from error
        if repeated:
            raise CheckpointDamagedError(f"a plain value's {tag} has a key twice: {_short(pair[0])}")
    return result


def _expect(tag: str, payload: Any, kind: type) -> Any:
    if type(payload) is not kind:
        raise CheckpointDamagedError(f"a plain value's {tag} holds {type(payload).__name__}, not {kind.__name__}")
    return payload


def _short(data: Any) -> str:
    text = repr(data) if isinstance(data, (str, int, float, bool, type(None))) else type(data).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _decode_int(payload: Any) -> int:
    if not _HEX_INT.fullmatch(payload):
        raise ValueError(payload)
    return int(payload, 16)


def _decode_float(payload: Any) -> float:
    if payload in ("nan", "inf", "-inf"):
        return float(payload)
    if type(payload) is not str or len(payload) != 16:
        raise ValueError(payload)
    value: float = struct.unpack(">d", bytes.fromhex(payload))[0]
    if not math.isnan(value):
        raise ValueError(payload)
    return value


def _decode_complex(payload: Any) -> complex:
    real, imaginary = (_decode(part, 1) for part in _expect("$complex", payload, list))
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError(payload)
    return complex(real, imaginary)


def _decode_bytes(payload: Any) -> bytes:
    return base64.b64decode(_expect("$bytes", payload, str), validate=True)


def _decode_numpy_scalar(payload: Any) -> np.generic[Any]:
    name, digits = _expect("$numpy", payload, list)
    dtype = DTYPES[name].numpy
    raw = bytes.fromhex(digits)
    if dtype.name != name or len(raw) != dtype.itemsize:
        raise ValueError(payload)
    stored = dtype.newbyteorder("<") if dtype.kind in "iufc" else dtype
    scalar: np.generic[Any] = np.frombuffer(raw, stored).astype(dtype)[0]
    return scalar


def _decode_numpy_dtype(payload: Any) -> np.dtype[Any]:
    text = _expect("$dtype", payload, str)
    if text in DTYPES:
        if DTYPES[text].numpy.name != text:
            raise ValueError(text)
        return DTYPES[text].numpy
    if not re.fullmatch(r"[<>|=][biufcSUMm]\d{1,9}(\[\d{0,9}[A-Za-z]{1,2}\])?", text):
        raise ValueError(text)
    dtype: np.dtype[Any] = np.dtype(text)
    return dtype


def _framework_decoder(tag: str) -> Callable[[Any], Any] | None:
    match = _FRAMEWORK_TAG.fullmatch(tag)
    if match is None:
        return None
    framework, kind = match.groups()

    def decoder(payload: Any) -> Any:
        plain = _framework_payload(kind, payload)
        for adapter in adapters():
            if adapter.name == framework:
                return adapter.decode_value(kind, plain)
        return f"{framework}.{plain}" if kind == "dtype" else tuple(plain) if kind == "size" else plain

    return decoder


def _framework_payload(kind: str, payload: Any) -> Any:
    if kind == "size":
        lengths: Iterable[Any] = _expect("size", payload, list)
        if all(type(length) is int and 0 <= length < 2**63 for length in lengths):
            return payload
    elif type(payload) is str and re.fullmatch(r"[a-z0-9_]{1,64}(:\d{1,6})?", payload):
        return payload
    raise ValueError(payload)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$int": _decode_int,
    "$float": _decode_float,
    "$complex": _decode_complex,
    "$str": lambda payload: _decode_bytes(payload).decode("utf-8", "surrogatepass"),
    "$bytes": _decode_bytes,
    "$numpy": _decode_numpy_scalar,
    "$dtype": _decode_numpy_dtype,
}


def digest(data: Any) -> bytes:
    """Return 8 bytes that are equal for equal values: the start of the SHA-256 of a canonical dump.

    Takes what `encode` returned. The order of a dict's and of a Counter's keys makes no difference, as in
    `==`.
    """
    text = json.dumps(_canonical(data), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:8]


def _canonical(data: Any) -> Any:
    if type(data) is list:
        return [_canonical(item) for item in data]
    if type(data) is not dict:
        return data
    result = {key: _canonical(item) for key, item in data.items()}
    for tag in ("$dict", "$counter"):
        if tag in result:
            result[tag] = sorted(result[tag], key=json.dumps)
    return result
