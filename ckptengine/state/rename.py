"""By which names a state has what a checkpoint has under others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import LoadMismatchError
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.state.kinds import ROOT, Inspector, Kind, children

__all__ = ["Rename", "renamer"]

Rename = Mapping[str, str] | Mapping[re.Pattern[str], str] | Mapping[str | re.Pattern[str], str] | Callable[[str], str]
"""How names are changed: by prefixes and patterns, or by a function from a dotted name to a dotted name."""

_WILD = re.compile(r"\*\*?")


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A rule for many names: what it finds, and what stands in the place of that."""

    expression: re.Pattern[str]
    template: str

    def apply(self, name: str) -> str | None:
        """Return the new name, None where the rule finds nothing in it."""
        new, count = self.expression.subn(self.template, name)
        return new if count else None


def renamer(rename: Rename | None, state: Mapping[str, Any], flat: bool = False) -> Callable[[Path], Path]:
    """Return the function from a path in the checkpoint to one in the state.

    Takes dotted prefixes of the checkpoint and what they are in the state; the longest that fits is taken. A
    prefix ends where a key ends, or at a dot inside a key (`model.head` fits the module `model`'s
    `head.weight`). A prefix with `*` stands for many: `*` is any text without a dot, `**` any text, and those of the
    new name are what those of the old one stand for, in order. A compiled regular expression replaces what it finds in
    the dotted name, as `re.sub` does. Patterns come after plain prefixes, in the order given. A function gets the
    dotted name and returns another.

    With `flat` the checkpoint's names are text: each is taken for what the state has under that text. Raises
    `ValueError` for a rule that says nothing.
    """
    if not rename and not flat:
        return lambda path: path
    places = _Places(state)

    def place(text: str) -> Path:
        found = places.resolve(text, flat)
        if found is not None:
            return found[0]
        return (text,) if flat else tuple(text.split("."))

    if callable(rename):
        return _by_function(rename, place, flat)
    plain, patterns = _rules(rename or {})

    def renamed(path: Path) -> Path:
        for old, new in plain:
            rest = _after(path, old)
            if rest is not None:
                partial, keys = rest
                text = ".".join(part for part in (new, partial) if part)
                if flat:
                    return place(".".join(map(str, (text, *keys) if text else keys)))
                found, in_module = places.resolve(text) or (tuple(text.split(".")), False)
                if in_module and keys and not partial:  # the rest of a name that is one key
                    found, keys = (*found[:-1], f"{found[-1]}.{keys[0]}"), keys[1:]
                return (*found, *keys)
        if not path:
            return path
        whole = dotted(path)
        for pattern in patterns:
            changed = pattern.apply(whole)
            if changed is not None:
                return place(changed)
        return place(whole) if flat else path

    return renamed


def _by_function(function: Callable[[str], str], place: Callable[[str], Path], flat: bool) -> Callable[[Path], Path]:
    def renamed(path: Path) -> Path:
        if not path:
            return path
        name = dotted(path)
        new = function(name)
        if not isinstance(new, str) or not new:
            raise LoadMismatchError(f"rename: the function made {new!r:.80} of {name!r}; it must return a name")
        return path if new == name and not flat else place(new)

    return renamed


def _rules(rename: Mapping[Any, str]) -> tuple[list[tuple[str, str]], list[_Pattern]]:
    """Return the plain rules, the longest first, and the patterns in their order."""
    plain: list[tuple[str, str]] = []
    patterns: list[_Pattern] = []
    for old, new in rename.items():
        if not isinstance(new, str) or not isinstance(old, str | re.Pattern):
            raise ValueError(
                f"rename={{{old!r}: {new!r}}}: names are text, or a compiled regular expression for the old"
            )
        if isinstance(old, re.Pattern):
            patterns.append(_Pattern(old, new))
        elif "*" in old:
            patterns.append(_glob(old, new))
        elif "*" in new:
            raise ValueError(f"rename={{{old!r}: {new!r}}}: the new name has a *, the old one none")
        else:
            plain.append((old, new))
    return sorted(plain, key=lambda rule: len(rule[0]), reverse=True), patterns


def _glob(old: str, new: str) -> _Pattern:
    wild, filled = _WILD.findall(old), len(_WILD.findall(new))
    if len(wild) != filled:
        raise ValueError(
            f"rename={{{old!r}: {new!r}}}: {len(wild)} * in the old name, {filled} in the new one; each stands for one"
        )
    texts = [re.escape(text) for text in _WILD.split(old)]
    parts = [text + ("(.*)" if star == "**" else "([^.]*)") for text, star in zip(texts, wild, strict=False)]
    fills = iter(range(1, filled + 1))
    escaped = new.replace("\\", r"\\")
    template = _WILD.sub(lambda _: f"\\g<{next(fills)}>", escaped)
    return _Pattern(re.compile(rf"\A{''.join(parts)}{texts[-1]}(?=\.|\Z)"), template)


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


class _Places:
    """The state, in which dotted names are looked up; what a container has is found out once."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state, self._inspector = state, Inspector()
        self._known: dict[int, tuple[Kind, dict[str, tuple[Key, Any]]]] = {}

    def resolve(self, text: str, whole: bool = False) -> tuple[Path, bool] | None:
        """Return the keys of a dotted name in the state, and whether the last is the start of a module's key.

        With `whole` the name is that of a leaf, without it that of anything with leaves. None where the state has no
        such thing.
        """
        return self._resolve(text, self._state, (), whole)

    def _look(self, value: Any, path: Path) -> tuple[Kind, dict[str, tuple[Key, Any]]]:
        if id(value) not in self._known:
            found = ROOT if path == () else self._inspector.inspect(value, path)
            inner = children(value, path) if found.kind in (Kind.DICT, Kind.SEQUENCE) else []
            self._known[id(value)] = found.kind, {str(key): (key, item) for key, item in inner}
        return self._known[id(value)]

    def _resolve(self, text: str, value: Any, path: Path, whole: bool) -> tuple[Path, bool] | None:
        if not text:
            return (), False
        kind, items = self._look(value, path)
        if kind is Kind.DECLARED:
            return self._resolve(text, value.value, path, whole)
        if kind is Kind.PER_RANK:
            return self._resolve(text, value.value, (*path, ""), whole)
        if kind is Kind.MODULE:
            return (text,), True
        if kind is Kind.OPTIMIZER:
            head, _, tail = text.partition(".")
            if whole and head == "state" and "." in tail:  # a parameter's name has dots, what is kept for it has none
                name, _, kept = tail.rpartition(".")
                return (head, name, kept), False
            return ((head, tail) if tail else (head,)), False
        if text in items:
            return (items[text][0],), False
        dot = text.rfind(".")
        while dot > 0:  # the longest key first
            if text[:dot] in items:
                key, item = items[text[:dot]]
                rest = self._resolve(text[dot + 1 :], item, (*path, key), whole)
                if rest is not None:
                    return (key, *rest[0]), rest[1]
            dot = text.rfind(".", 0, dot)
        return None
