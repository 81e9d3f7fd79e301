"""Checkpoints that are called as MindSpore calls its files: `prefix-000012_000032.ckpt`, each a directory of ours."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ckptengine.catalog.listing import committed, manifest_name, next_generation
from ckptengine.catalog.retention import remove_leftovers, replace_older
from ckptengine.storage.open import open_storage

__all__ = ["Checkpoints", "Numbered", "find_checkpoint", "numbered_name"]

_NUMBERS = re.compile(r"(?P<prefix>.+)-(?P<epoch>\d+)_(?P<step>\d+)(?P<rest>(_breakpoint)?\.[a-z]+)")
_DIGITS = 6


def numbered_name(prefix: str, epoch: int, step: int, suffix: str) -> str:
    """Return the name of an epoch's step, with zeros in front: sorted as text, the newest is the last.

    `prefix-9_32.ckpt` would come after `prefix-10_32.ckpt`, and scripts that sort names would take the older.
    """
    return f"{prefix}-{epoch:0{_DIGITS}d}_{step:0{_DIGITS}d}.{suffix}"


@dataclass(frozen=True, slots=True, order=True)
class Numbered:
    """A committed checkpoint by the numbers in its name; the order is that of training."""

    epoch: int
    step: int
    name: str


def find_checkpoint(path: str) -> str | None:
    """Return where the checkpoint of this name lies, None where there is none of ours.

    Numbers are compared as numbers: `prefix-9_32.ckpt` finds `prefix-000009_000032.ckpt`.
    """
    directory, name = os.path.split(os.path.realpath(path))
    if committed(open_storage(os.path.join(directory, name))):
        return path
    wanted = _NUMBERS.fullmatch(name)
    if wanted is None or not os.path.isdir(directory):
        return None
    for other in sorted(os.listdir(directory)):
        found = _NUMBERS.fullmatch(other)
        if found is not None and _key(found) == _key(wanted) and committed(open_storage(f"{directory}/{other}")):
            return os.path.join(directory, other)
    return None


def _key(match: re.Match[str]) -> tuple[str, int, int, str]:
    return match["prefix"], int(match["epoch"]), int(match["step"]), match["rest"]


class Checkpoints:
    """The checkpoints of one prefix in a directory, and which of them are kept."""

    def __init__(self, directory: str, prefix: str, suffix: str) -> None:
        self._directory, self._prefix, self._rest = directory, prefix, f".{suffix}"

    def all(self) -> list[Numbered]:
        """Return those that are committed, oldest first, by epoch and step as numbers."""
        found = []
        for name in os.listdir(self._directory):
            match = _NUMBERS.fullmatch(name)
            if match is None or match["prefix"] != self._prefix or match["rest"] != self._rest:
                continue
            if os.path.islink(os.path.join(self._directory, name)):
                continue  # what it points to may be another training's
            if committed(open_storage(os.path.join(self._directory, name))):
                found.append(Numbered(int(match["epoch"]), int(match["step"]), name))
        return sorted(found)

    def keep_newest(self, count: int) -> list[str]:
        """Delete all but the newest `count` by epoch and step; return what could not be deleted."""
        return self._delete(self.all()[:-count])

    def keep_one_per(self, minutes: float) -> list[str]:
        """Delete all but the first that was committed in each period of so many minutes, and the newest.

        A period begins with the first checkpoint that lies outside of the one before. Returns what could not be
        deleted.
        """
        begun, unwanted = -float("inf"), []
        for one in self.all()[:-1]:
            when = self._committed_at(one)
            if when - begun >= 60 * minutes:
                begun = when
            else:
                unwanted.append(one)
        return self._delete(unwanted)

    def _committed_at(self, one: Numbered) -> float:
        path = Path(self._directory, one.name)
        return (path / manifest_name(committed(open_storage(path))[-1].generation)).stat().st_mtime

    def _delete(self, unwanted: list[Numbered]) -> list[str]:
        problems: list[str] = []
        parent = open_storage(self._directory)
        for one in unwanted:
            storage = open_storage(os.path.join(self._directory, one.name))
            problems += replace_older(storage, next_generation(storage))
            problems += remove_leftovers(storage)
            parent.remove_directory(one.name)
        return problems
