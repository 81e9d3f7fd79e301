"""How a state is built: its containers, their classes and the order of their keys, and how its arrays lie in memory."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import CheckpointDamagedError
from ckptengine.state.leaf import HostMemory, Key, Part, Path, dotted

__all__ = [
    "Container",
    "Outline",
    "class_name",
    "decode_outline",
    "memory_order",
    "part_order",
    "sorted_keys",
]

_LEVEL = 6
_MAX_NBYTES_PER_LEAF = 16 << 10
"""What an outline may take at most when it is unpacked, for each leaf or plain value beside it: no file inflates."""


@dataclass(frozen=True, slots=True)
class Container:
    """Something of a state that holds leaves, or hands them over.

    `kind` is `dict`, `ordered`, `list`, `tuple`, `module`, `optimizer` or `object`; an object's state follows under the
    same path. `cls` is the qualified name of an optimizer's or an object's class, else empty. `keys` are in the order
    of the state; None where there are none (sequences, objects), or they are sorted.
    """

    path: Path
    kind: str
    cls: str = ""
    keys: tuple[Key, ...] | None = None


@dataclass(frozen=True)
class Outline:
    """The containers of a state in the order of the walk, and the arrays that don't lie in C order.

    `orders` has for each of these the dimensions from the outermost in memory to the innermost (see `memory_order`).
    """

    containers: tuple[Container, ...] = ()
    orders: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    @functools.cached_property
    def encoded(self) -> str:
        """The outline as it is stored: made once for all saves of one structure."""
        records: dict[tuple[Any, ...], int] = {}
        containers = []
        for one in self.containers:
            record = one.kind, one.cls, one.keys
            containers.append([records.setdefault(record, len(records)), list(one.path)])
        document = {
            "records": [[kind, cls, None if keys is None else list(keys)] for kind, cls, keys in records],
            "containers": containers,
            "orders": [[list(path), list(order)] for path, order in self.orders.items()],
        }
        text = json.dumps(document, separators=(",", ":")).encode()
        return base64.b64encode(zlib.compress(text, _LEVEL)).decode()

    @functools.cached_property
    def by_path(self) -> dict[Path, list[Container]]:
        """The containers of each path, an object before its state."""
        result: dict[Path, list[Container]] = {}
        for one in self.containers:
            result.setdefault(one.path, []).append(one)
        return result


def decode_outline(text: object, leaves: int) -> Outline:
    """Return the outline that `Outline.encoded` stood for, given the number of leaves and values it belongs to.

    Raises `CheckpointDamagedError` where the text is anything else.
    """
    if not isinstance(text, str):
        raise CheckpointDamagedError("the structure is not a string")
    limit = (leaves + 16) * _MAX_NBYTES_PER_LEAF
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(base64.b64decode(text, validate=True), limit)
        if not unpacker.eof:
            raise CheckpointDamagedError(f"the structure takes more than {limit:,} bytes, or is cut")
        document = json.loads(plain)
        records = [_record(*record) for record in document["records"]]
        containers = tuple(Container(_path(path), *records[_index(number)]) for number, path in document["containers"])
        orders = {_path(path): _order(order) for path, order in document["orders"]}
    except (binascii.Error, zlib.error, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointDamagedError(f"the structure is damaged ({type(error).__name__}: {error})") from error
    return Outline(containers, orders)


def class_name(value: Any) -> str:
    """Return the qualified name of a value's class."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def memory_order(shape: Sequence[int], strides: Iterable[int]) -> tuple[int, ...] | None:
    """Return the dimensions of a tensor from the outermost in memory to the innermost; None where that is C order.

    (0, 2, 3, 1) is torch's `channels_last`, (1, 0) a column-major matrix. Gaps between elements say nothing.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    steps = [abs(stride) for stride in strides]
    natural = tuple(range(len(steps)))
    order = tuple(sorted(natural, key=lambda dim: -steps[dim]))
    return None if order == natural else order


def part_order(part: Part) -> tuple[int, ...] | None:
    """Return the `memory_order` of one box of a leaf; None also where its framework does not tell."""
    memory = part.memory
    if isinstance(memory, HostMemory):
        return memory_order(part.box.shape, memory.strides)
    stride = getattr(memory.owner, "stride", None)
    return memory_order(part.box.shape, stride()) if callable(stride) else None


def sorted_keys(keys: Iterable[Key]) -> list[Key]:
    """Return keys as a checkpoint's tables have them: strings first, then integers."""
    return sorted(keys, key=lambda key: (True, key, "") if isinstance(key, int) else (False, 0, key))


def _record(kind: object, cls: object, keys: object) -> tuple[str, str, tuple[Key, ...] | None]:
    if not isinstance(kind, str) or not isinstance(cls, str):
        raise ValueError("a container without kind and class")
    return kind, cls, None if keys is None else _path(keys)


def _path(value: object) -> Path:
    if not isinstance(value, list) or not all(type(key) in (str, int) for key in value):
        raise ValueError(f"{value!r:.80} is no list of keys")
    return tuple(value)


def _index(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is no index")
    return value


def _order(value: object) -> tuple[int, ...]:
    order = _path(value)
    if sorted(order, key=str) != sorted(range(len(order)), key=str):
        raise ValueError(f"{dotted(order)} is no order of dimensions")
    return tuple(int(dim) for dim in order)
