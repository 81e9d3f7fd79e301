"""How a state is built: its containers, their classes and the order of their keys, and how its arrays lie in memory."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from ckptengine.errors import CheckpointDamagedError
from ckptengine.frameworks.adapter import TensorKind, TensorView
from ckptengine.schema.leaf import HostMemory, Part
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.schema.type_name import class_of, full_name
from ckptengine.state.forms import Form
from ckptengine.state.nested import item_of
from ckptengine.state.values import decode, encode

__all__ = [
    "Container",
    "Outline",
    "class_name",
    "decode_outline",
    "in_given_order",
    "in_order",
    "is_of_class",
    "memory_order",
    "ordered_forms",
    "part_order",
    "put_in_order",
    "renamed_key",
    "sorted_keys",
]

_T = TypeVar("_T")

_LEVEL = 6
_GENERIC = frozenset({"Optimizer", "LRScheduler", "_LRScheduler", "Protocol", "Generic", "ABC", "Stateful"})
"""Bases that say nothing of what a state means."""
_KINDS: dict[str, type] = {"parameters": bool, "tensors": dict}
"""Where an outline has the kinds of tensors: those of parameters, which earlier versions know, and all others."""
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
    `shapes` has the shape of each parameter that an optimizer has state for and that is in none of the state's modules,
    under the path of that state. `metadata` has torch's `_metadata` of each `OrderedDict` that has one (the versions of
    a module's parts), by which a later `load_state_dict` knows what it is given; `tells_metadata` is False where the
    checkpoint does not say which have none. `spreads` says of arrays in the state of a distributed parameter how they
    were spread (`Adapter.state_spread`), where that is not what is usual. `empty` has the paths of parameters' states
    in optimizers that were there and held nothing: any other parameter without leaves had no state. It is None where
    there is no optimizer, and where the checkpoint does not say. `kinds` says of each array that is in no module
    what it is beside its contents, where that is more than a plain tensor; `tells_kinds` is False where the checkpoint
    knows that of parameters alone.
    """

    containers: tuple[Container, ...] = ()
    orders: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[Path, Any] = field(default_factory=dict)
    spreads: Mapping[Path, str] = field(default_factory=dict)
    empty: tuple[Path, ...] | None = None
    tells_metadata: bool = True
    kinds: Mapping[Path, TensorKind] = field(default_factory=dict)
    tells_kinds: bool = True

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
        if self.shapes:
            document["shapes"] = [[list(path), list(shape)] for path, shape in self.shapes.items()]
        if self.metadata or any(one.kind == "ordered" for one in self.containers):
            document["metadata"] = [
                [list(path), encode(value, (*path, "_metadata"))] for path, value in self.metadata.items()
            ]
        if self.spreads:
            document["spreads"] = [[list(path), how] for path, how in self.spreads.items()]
        for name, kind in _KINDS.items():
            told = [[list(path), one] for path, one in self.kinds.items() if isinstance(one, kind)]
            if told or kind is dict:
                document[name] = told
        if self.empty is not None:
            document["empty"] = [list(path) for path in self.empty]
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
        shapes = {_path(path): tuple(map(_index, _path(shape))) for path, shape in document.get("shapes", [])}
        metadata = {_path(path): decode(value) for path, value in document.get("metadata", [])}
        spreads = {_path(path): str(how) for path, how in document.get("spreads", [])}
        kinds = {_path(path): _kind(one, kind) for n, kind in _KINDS.items() for path, one in document.get(n, [])}
        empty = tuple(map(_path, document["empty"])) if "empty" in document else None
    except (binascii.Error, zlib.error, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointDamagedError(f"the structure is damaged ({type(error).__name__}: {error})") from error
    return Outline(
        containers, orders, shapes, metadata, spreads, empty, "metadata" in document, kinds, "tensors" in document
    )


def class_name(value: Any) -> str:
    """Return the qualified name of a value's class."""
    return full_name(class_of(value))


def is_of_class(value: Any, name: str) -> bool:
    """Whether a value is of a class of this name, or of one made from it.

    A class that has moved inside its package is the same one, and so is one of the program that is run (`__main__`).
    """
    if not name:
        return True
    return any(
        _same_class(f"{kind.__module__}.{kind.__qualname__}", kind.__qualname__, name) for kind in _own_mro(value)
    )


def _own_mro(value: Any) -> Iterable[type]:
    return (kind for kind in class_of(value).__mro__ if kind is not object and kind.__qualname__ not in _GENERIC)


def _same_class(full: str, qualname: str, name: str) -> bool:
    if full == name:
        return True
    if not name.endswith(f".{qualname}"):
        return False
    packages = {full.partition(".")[0], name.partition(".")[0]}
    rest = name.removesuffix(f".{qualname}").rpartition(".")[2]  # a nested class's outer one begins with a capital
    return (len(packages) == 1 or "__main__" in packages) and not rest[:1].isupper()


def put_in_order(nested: dict[Key, Any], outline: Outline, rename: Callable[[Path], Path]) -> None:
    """Put the keys of nested dicts, in place, in the order that the state had them in; others keep their place."""
    for one in outline.containers:
        if one.kind in ("object", "list", "tuple"):
            continue
        found: Any = nested
        for key in rename(one.path):
            found = item_of(found, key)
        if isinstance(found, dict) and all(type(key) in (str, int) for key in found):  # else its form has the order
            keys = sorted_keys(found) if one.keys is None else [renamed_key(one.path, key, rename) for key in one.keys]
            items = in_given_order(found, keys)
            found.clear()
            found.update(items)


def ordered_forms(outline: Outline) -> dict[Path, Form]:
    """Return the forms of the state's ordered dicts, which outlines tell of and tables of containers do not."""
    kinds = (one for one in outline.containers if one.kind == "ordered")
    return {one.path: {"$ordered": outline.metadata.get(one.path)} for one in kinds}


def renamed_key(path: Path, key: Key, rename: Callable[[Path], Path]) -> Key:
    """Return what a container's key is called after renaming."""
    renamed = rename((*path, key))
    return renamed[-1] if renamed else key


def in_given_order(items: Mapping[Key, _T], keys: Iterable[Key]) -> dict[Key, _T]:
    """Return a dict with its keys in an order; those that are not in it come last."""
    place = {key: number for number, key in enumerate(keys)}
    return dict(sorted(items.items(), key=lambda item: place.get(item[0], len(place))))


def memory_order(shape: Sequence[int], strides: Iterable[int]) -> tuple[int, ...] | None:
    """Return the dimensions of a tensor from the outermost in memory to the innermost; None where that is C order.

    (0, 2, 3, 1) is torch's `channels_last`, (1, 0) a column-major matrix. Gaps between elements say nothing.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    steps = [abs(stride) for stride in strides]
    if steps == sorted(steps, reverse=True):
        return None
    return tuple(sorted(range(len(steps)), key=lambda dim: -steps[dim]))


def part_order(part: Part) -> tuple[int, ...] | None:
    """Return the `memory_order` of one box of a leaf; None also where its framework does not tell."""
    memory = part.memory
    if part.order is not None:
        return None if list(part.order) == sorted(part.order) else part.order
    if isinstance(memory, HostMemory):
        return memory_order(part.box.shape, memory.strides)
    stride = getattr(memory.owner, "stride", None)
    return memory_order(part.box.shape, stride()) if callable(stride) else None


def in_order(view: TensorView, order: Sequence[int] | None) -> bool:
    """Whether what this rank has of a tensor lies in memory in an order (None: C); a length of 1 says nothing."""
    if not view.parts or view.parts[0].order is not None:  # it can't lie otherwise
        return True
    shape, here = view.parts[0].box.shape, part_order(view.parts[0])
    natural = range(len(shape))
    if order is not None and len(order) != len(shape):
        return True
    a, b = ([dim for dim in wanted or natural if shape[dim] > 1] for wanted in (here, order))
    return a == b


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


def _kind(value: Any, kind: type) -> TensorKind:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.80} is no kind of a tensor")
    return cast(TensorKind, value)


def _index(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is no index")
    return value


def _order(value: object) -> tuple[int, ...]:
    order = _path(value)
    if sorted(order, key=str) != sorted(range(len(order)), key=str):
        raise ValueError(f"{dotted(order)} is no order of dimensions")
    return tuple(int(dim) for dim in order)
