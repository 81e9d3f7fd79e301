"""The forms of containers that hold arrays: what else than their items they are made of."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any, cast

from ckptengine.errors import CheckpointDamagedError, LoadMismatchError, StateError
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.schema.type_name import describe_type, full_name
from ckptengine.state.classes import factory_name, is_namedtuple, named_factory, named_tuple
from ckptengine.state.values import decode, encode

__all__ = ["Form", "container_kind", "form_of", "is_form", "own_keys", "path_keys", "rebuild"]

Form = str | dict[str, Any]
"""`list` or `tuple`; or an object with one of the tags `$deque` (maxlen), `$namedtuple` (class, fields), `$defaultdict`
(factory), `$dict` (pairs of the key in paths and the key itself, as typed JSON), `$class` (a class made from dict); and
`$ordered` (torch's `_metadata` or null), which a state's outline tells of, not its table of containers."""

_TAGS = frozenset({"$deque", "$namedtuple", "$defaultdict", "$dict", "$class"})


def path_keys(value: Mapping[Any, Any], path: Path) -> list[Key]:
    """Return the keys under which a dict's items lie in paths: strings and integers themselves, others as their `repr`.

    Raises `StateError` naming the path where a key is no plain value, or two would be the same.
    """
    if all(type(key) in (str, int) for key in value):
        return list(value)
    keys: list[Key] = []
    for key in value:
        if type(key) not in (str, int):
            encode(key, (*path, f"<key {key!r}>"))  # raises where it couldn't be given back
        keys.append(key if type(key) in (str, int) else repr(key))
    if len(set(keys)) != len(keys):
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        where = dotted(path) or "the state"
        raise StateError(f"{where}: two keys of the dict are written {twice!r}; use keys that are all of one type")
    return keys


def own_keys(value: Any) -> list[Any]:
    """Return the keys by which a container's items are got and set."""
    return list(value) if isinstance(value, Mapping) else list(range(len(value)))


def container_kind(value: Any) -> str:
    """Return what the outline of a state calls a container."""
    if isinstance(value, Mapping):
        return {OrderedDict: "ordered", defaultdict: "defaultdict"}.get(type(value), "dict")
    if isinstance(value, tuple):
        return "namedtuple" if is_namedtuple(value) else "tuple"
    return "deque" if isinstance(value, deque) else "list"


def form_of(value: Any, path: Path) -> Form | None:
    """Return the form of a container that is walked, None for a plain dict with keys that fit paths.

    Raises `StateError` naming the path where it couldn't be made again.
    """
    if isinstance(value, Mapping):
        if type(value) is defaultdict:
            _refuse_odd_keys(value, path)
            return {"$defaultdict": factory_name(value, path)}
        keys = path_keys(value, path)
        if any(type(key) not in (str, int) for key in value):
            if type(value) is not dict:
                _refuse_odd_keys(value, path)
            return {"$dict": [[at, encode(key, path)] for at, key in zip(keys, value, strict=True)]}
        plain = type(value) in (dict, OrderedDict) or not isinstance(value, dict)
        return None if plain else {"$class": full_name(type(value))}
    if type(value) in (list, tuple):
        return type(value).__name__
    if type(value) is deque:
        return {"$deque": value.maxlen}
    if is_namedtuple(value):
        return {"$namedtuple": [full_name(type(value)), list(value._fields)]}
    raise StateError(f"{dotted(path)}: {describe_type(value)} holds tensors; convert it to a plain list, tuple or dict")


def _refuse_odd_keys(value: Mapping[Any, Any], path: Path) -> None:
    odd = next((key for key in value if type(key) not in (str, int)), None)
    if odd is not None:
        raise StateError(
            f"{dotted(path)}: a {describe_type(value)} that holds tensors needs keys that are str or int, not "
            f"{describe_type(odd)} ({odd!r}); convert it to a plain dict"
        )


def is_form(value: Any) -> bool:
    """Whether something that was stored is a form that this version knows; what isn't is treated as a dict."""
    if isinstance(value, dict):
        return len(value) == 1 and next(iter(value)) in _TAGS
    return value in ("list", "tuple")


def rebuild(form: Form | None, items: dict[Key, Any], like: Any, path: Path, *, strict: bool) -> Any:
    """Return a container of a form, made of items by their keys in paths; a dict where items of a sequence are missing.

    `like` is what lies there now: of a class made from dict, a new one is made like it. Without such a one, raises
    `LoadMismatchError` with `strict`, and returns a dict without. Raises `CheckpointDamagedError` where no form is
    such.
    """
    if form is None:
        return items
    try:
        tag, payload = cast(tuple[str, Any], (form, None) if isinstance(form, str) else next(iter(form.items())))
        if tag == "$defaultdict":
            return defaultdict(named_factory(payload), items)
        if tag == "$dict":
            known = {at: decode(key) for at, key in payload}
            ordered = [*(at for at in known if at in items), *(at for at in items if at not in known)]
            return {known.get(at, at): items[at] for at in ordered}
        if tag == "$ordered":
            ordered_dict: Any = OrderedDict(items)
            if payload is not None:
                ordered_dict._metadata = payload
            return ordered_dict
        if tag == "$class":
            return _of_class(payload, items, like, path, strict)
        if set(items) != set(range(len(items))):
            return items
        ordered = [items[index] for index in range(len(items))]
        if tag == "$deque":
            return deque(ordered, payload)
        if tag == "$namedtuple":
            return named_tuple(payload[0], tuple(payload[1]), ordered)
        return tuple(ordered) if tag == "tuple" else ordered
    except LoadMismatchError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointDamagedError(f"{dotted(path)}: the form of a container is damaged: {form!r:.80}") from error


def _of_class(name: str, items: dict[Key, Any], like: Any, path: Path, strict: bool) -> Any:
    if isinstance(like, dict) and full_name(type(like)) == name:
        new = type(like)()
        new.update(items)
        return new
    if strict:
        raise LoadMismatchError(
            f"{dotted(path)}: is a {name} in the checkpoint, and there is none here to make one like it; put one into "
            "the state, or save a plain dict (`dict(value)`)"
        )
    return items
