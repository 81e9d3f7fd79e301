"""The places of a run must lie apart: each deletes what it takes for its own checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["check_apart"]

_Place = tuple[tuple[int, int], tuple[str, ...]]


def check_apart(places: Mapping[str, str]) -> None:
    """Raise `ValueError` where one of some directories, by the name of the argument, is another one or lies in it.

    Links are followed, and directories that are reached by two ways (bind mounts) are told by their inodes.
    """
    paths = {name: os.path.realpath(path) for name, path in places.items()}
    for inner, path in paths.items():
        around = {_place(directory) for directory in _upwards(path)}
        for outer, other in paths.items():
            if inner != outer and _place(other) in around:
                same = _place(other) == _place(path)
                how = "is the same directory as" if same else "lies inside of"
                raise ValueError(
                    f"{inner}={places[inner]!r} {how} {outer}={places[outer]!r}: each place of a run keeps and deletes "
                    "its own checkpoints; give each its own directory"
                )


def _upwards(path: str) -> list[str]:
    found = [path]
    while os.path.dirname(found[-1]) != found[-1]:
        found.append(os.path.dirname(found[-1]))
    return found


def _place(path: str) -> _Place:
    """Return what two ways to one directory have in common: the inode that is there, and the names that are missing."""
    missing: list[str] = []
    while True:
        try:
            found = os.stat(path)
        except OSError:
            path, name = os.path.split(path)
            if not name:
                return (0, 0), (path, *missing[::-1])
            missing.append(name)
            continue
        return (found.st_dev, found.st_ino), tuple(missing[::-1])
