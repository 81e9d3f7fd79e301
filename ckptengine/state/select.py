"""Which leaves of a state are meant, and by which names the checkpoint has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckptengine.errors import LoadMismatchError
from ckptengine.schema.path import Path, dotted
from ckptengine.state.kinds import Inspector, Kind, children

__all__ = ["Selection", "module_names", "renamer"]


class Selection:
    """The parts of a state that `only` names; remembers which prefixes named something."""

    def __init__(self, only: Iterable[str] | None) -> None:
        self._prefixes = None if only is None else tuple(only)
        self._matched: set[str] = set()

    def holds(self, path: Path) -> bool:
        """Whether a leaf, or everything under a path, is meant."""
        if self._prefixes is None:
            return True
        name = dotted(path)
        matches = [p for p in self._prefixes if name == p or name.startswith(f"{p}.")]
        self._matched.update(matches)
        return bool(matches)

    def reaches(self, path: Path) -> bool:
        """Whether what lies at a path is meant, or something inside of it."""
        inside = [p for p in self._prefixes or () if p.startswith(f"{dotted(path)}.")]
        self._matched.update(inside)
        return self.holds(path) or bool(inside)

    def touches(self, path: Path) -> bool:
        """Whether what lies at a path may be meant, or something inside of it; remembers nothing."""
        name = dotted(path)
        prefixes = (name,) if self._prefixes is None else self._prefixes
        return any(name == p or name.startswith(f"{p}.") or p.startswith(f"{name}.") for p in prefixes)

    def refuse_part(self, path: Path) -> None:
        """Raise where something inside is meant of what can only be loaded as a whole."""
        name = dotted(path)
        for prefix in self._prefixes or ():
            if prefix.startswith(f"{name}."):
                raise LoadMismatchError(f"only={prefix!r}: {name} can only be loaded as a whole; pass {name!r}")

    def check(self) -> None:
        """Raise where a prefix has named nothing."""
        unknown = [prefix for prefix in self._prefixes or () if prefix not in self._matched]
        if unknown:
            raise LoadMismatchError(f"only={unknown}: the state has nothing of that name; names are dotted paths")


def module_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the dotted names of the modules in a state, those in dicts, lists and `PerRank` included."""
    inspector = Inspector()
    names: list[str] = []

    def look(value: Any, path: Path) -> None:
        kind, _ = (Kind.DICT, None) if path == () else inspector.kind(value, path)
        if kind is Kind.MODULE:
            names.append(dotted(path))
        elif kind is Kind.PER_RANK:
            look(value.value, path)
        elif kind in (Kind.DICT, Kind.SEQUENCE):
            for key, item in children(value, path):
                look(item, (*path, key))

    look(state, ())
    return tuple(names)


def renamer(rename: Mapping[str, str] | None, state: Mapping[str, Any]) -> Callable[[Path], Path]:
    """Return the function from a path in the checkpoint to one in the state.

    Takes dotted prefixes of the checkpoint and what they are in the state; the longest that fits is taken. A
    prefix ends where a key ends, or at a dot inside a key (`model.head` fits the module `model`'s
    `head.weight`).
    """
    if not rename:
        return lambda path: path
    rules = sorted(rename.items(), key=lambda rule: len(rule[0]), reverse=True)
    inspector = Inspector()

    def renamed(path: Path) -> Path:
        for old, new in rules:
            rest = _after(path, old)
            if rest is not None:
                partial, keys = rest
                text = ".".join(part for part in (new, partial) if part)
                found, in_module = _resolve(text, state, (), inspector) or (tuple(text.split(".")), False)
                if in_module and keys and not partial:  # the rest of a name that is one key
                    found, keys = (*found[:-1], f"{found[-1]}.{keys[0]}"), keys[1:]
                return (*found, *keys)
        return path

    return renamed


def _after(path: Path, prefix: str) -> tuple[str, Path] | None:
    """Return what follows a prefix: the rest of the key that it ends in, and the keys after."""
    if not prefix:
        return "", path
    for index, key in enumerate(path):
        name = str(key)
        if name == prefix:
            return "", path[index + 1 :]
        if name.startswith(f"{prefix}."):
            return name[len(prefix) + 1 :], path[index + 1 :]
        if not prefix.startswith(f"{name}."):
            return None
        prefix = prefix[len(name) + 1 :]
    return None


def _resolve(text: str, value: Any, path: Path, inspector: Inspector) -> tuple[Path, bool] | None:
    """Return the keys of a dotted name in a state, and whether the last is the start of a module's key.

    None where the state has no such thing.
    """
    if not text:
        return (), False
    kind, _ = (Kind.DICT, None) if path == () else inspector.kind(value, path)
    if kind is Kind.PER_RANK:
        return _resolve(text, value.value, (*path, ""), inspector)
    if kind is Kind.MODULE:
        return (text,), True
    if kind is Kind.OPTIMIZER:
        head, _, tail = text.partition(".")
        return ((head, tail) if tail else (head,)), False
    if kind not in (Kind.DICT, Kind.SEQUENCE):
        return None
    for key, item in sorted(children(value, path), key=lambda child: len(str(child[0])), reverse=True):
        if text == str(key):
            return (key,), False
        if text.startswith(f"{key}."):
            rest = _resolve(text[len(str(key)) + 1 :], item, (*path, key), inspector)
            if rest is not None:
                return (key, *rest[0]), rest[1]
    return None
