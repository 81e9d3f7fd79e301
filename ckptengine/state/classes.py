"""Values of the standard library's classes, and of named tuples and enums, as typed JSON.

| tag | payload |
|---|---|
| `$deque` | maxlen or null; the items |
| `$defaultdict` | name of the factory or null; pairs of key and value |
| `$namedtuple` | full name of the class; the fields; the items |
| `$enum` | full name of the class; the names of the members (one; several or none for a flag) |
| `$path` | class; text |
| `$set`, `$frozenset` | the items, in the order of their JSON |

Classes of named tuples and enums are looked up among the modules that are imported: what a checkpoint says imports
nothing and calls no code of theirs. Where the class is not there, a named tuple gets a class of that name made anew,
and an enum's member is an `UnknownMember`, the text of its name.
"""

from __future__ import annotations

import collections
import functools
import json
import operator
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum, Flag
from typing import Any

from ckptengine.errors import StateError
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import find_class, full_name

__all__ = [
    "CLASS_TAGS",
    "UnknownMember",
    "decode_class",
    "encode_class",
    "factory_name",
    "is_namedtuple",
    "named_factory",
    "named_tuple",
    "unknown_member",
]

Recurse = Callable[[Any, Path], Any]

_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind
    for kind in (list, dict, set, frozenset, tuple, str, bytes, int, float, complex, bool, deque, Counter, OrderedDict)
}
_PATHS = {
    "Path": (pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath),
    "PurePosixPath": (pathlib.PurePosixPath,),
    "PureWindowsPath": (pathlib.PureWindowsPath,),
}
CLASS_TAGS = frozenset({"$deque", "$defaultdict", "$namedtuple", "$enum", "$path", "$set", "$frozenset"})


class UnknownMember(str):
    """A member of an enum that is not imported: its full name."""

    __slots__ = ()


def is_namedtuple(value: Any) -> bool:
    """Whether a value is of a class that `collections.namedtuple` or `typing.NamedTuple` made."""
    fields = getattr(type(value), "_fields", None)
    return isinstance(value, tuple) and type(fields) is tuple and all(type(name) is str for name in fields)


def factory_name(value: defaultdict[Any, Any], path: Path) -> str | None:
    """Return the name of a defaultdict's factory; raises `StateError` naming the path where it is none of Python's."""
    factory = value.default_factory
    if factory is None:
        return None
    name = getattr(factory, "__name__", "")
    if _FACTORIES.get(name) is not factory:
        raise StateError(
            f"{dotted(path)}: the default_factory of the defaultdict is {factory!r}, which is code; use a class of "
            "Python's own such as list, dict or int, or save a plain dict: `dict(value)`"
        )
    return name


def named_factory(name: str | None) -> Callable[[], Any] | None:
    """Return the factory of a name; raises KeyError where there is none."""
    return None if name is None else _FACTORIES[name]


def encode_class(value: Any, path: Path, recurse: Recurse) -> dict[str, Any] | None:
    """Return a value as an object with one of the tags above, None where it is of none of these classes.

    `recurse` encodes an item at its path. Raises `StateError` naming the path.
    """
    if type(value) is deque:
        return {"$deque": [value.maxlen, [recurse(item, (*path, i)) for i, item in enumerate(value)]]}
    if type(value) is defaultdict:
        pairs = [
            [recurse(key, (*path, f"<key {key!r}>")), recurse(item, (*path, str(key)))] for key, item in value.items()
        ]
        return {"$defaultdict": [factory_name(value, path), pairs]}
    if is_namedtuple(value):
        items = [recurse(item, (*path, name)) for name, item in zip(value._fields, value, strict=True)]
        return {"$namedtuple": [full_name(type(value)), list(value._fields), items]}
    if isinstance(value, Enum):
        return {"$enum": [full_name(type(value)), _members(value, path)]}
    if type(value) in (set, frozenset):
        items = [recurse(item, (*path, f"<item {item!r}>")) for item in value]
        return {f"${type(value).__name__}": sorted(items, key=functools.partial(json.dumps, sort_keys=True))}
    for name, kinds in _PATHS.items():
        if type(value) in kinds:
            return {"$path": [name, recurse(str(value), path)]}
    return None


def _members(value: Enum, path: Path) -> list[str]:
    members = type(value).__members__
    if not isinstance(value, Flag):
        return [value.name]
    names = [name for name, member in members.items() if member.value and member.value & value.value == member.value]
    if functools.reduce(operator.or_, (members[name].value for name in names), 0) != value.value:
        raise StateError(
            f"{dotted(path)}: {value!r} has bits that no member of the enum names; save `int(value.value)`"
        )
    return names


def decode_class(tag: str, payload: Any, recurse: Callable[[Any], Any]) -> Any:
    """Return the value of a tag; raises ValueError, TypeError or KeyError where the payload is not one of it."""
    if tag in ("$set", "$frozenset"):
        return (set if tag == "$set" else frozenset)(recurse(item) for item in _of(list, payload))
    if tag == "$namedtuple":
        name, fields, items = payload
        return named_tuple(_of(str, name), tuple(_of(str, f) for f in fields), [recurse(i) for i in _of(list, items)])
    first, second = payload
    if tag == "$deque":
        return deque((recurse(item) for item in _of(list, second)), None if first is None else _of(int, first))
    if tag == "$defaultdict":
        return defaultdict(named_factory(first), [(recurse(key), recurse(item)) for key, item in second])
    if tag == "$enum":
        return _member(_of(str, first), [_of(str, name) for name in second])
    text = _of(str, recurse(second))
    return pathlib.Path(text) if first == "Path" else _PATHS[first][0](text)


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{kind.__name__} was expected, {value!r:.80} found")
    return value


def _member(name: str, members: list[str]) -> Any:
    kind = find_class(name)
    if kind is None or not issubclass(kind, Enum) or not all(member in kind.__members__ for member in members):
        return UnknownMember(f"{name}.{'|'.join(members)}")
    if issubclass(kind, Flag):
        return functools.reduce(operator.or_, (kind.__members__[member] for member in members), kind(0))
    (member,) = members
    return kind.__members__[member]


def named_tuple(name: str, fields: tuple[str, ...], items: list[Any]) -> Any:
    """Return a named tuple of the class of that name where it is imported and has these fields, else of a new one."""
    if len(fields) != len(items):
        raise ValueError(f"{len(items)} items for {len(fields)} fields")
    kind = find_class(name)
    if kind is None or not issubclass(kind, tuple) or getattr(kind, "_fields", None) != fields:
        kind = _new_class(name.rpartition(".")[2], fields)
    return tuple.__new__(kind, items)


@functools.lru_cache(maxsize=256)
def _new_class(name: str, fields: tuple[str, ...]) -> type:
    return collections.namedtuple(name, fields)  # it checks that these are names


def unknown_member(value: Any) -> str | None:
    """Return the name of an enum's member somewhere in a plain value whose enum is not imported, None without one."""
    if isinstance(value, UnknownMember):
        return str(value)
    inner = (*value, *value.values()) if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        return next((name for item in inner if (name := unknown_member(item)) is not None), None)
    return None
