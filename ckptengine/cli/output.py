"""What the commands share: where they print, how they write sizes and values, how they fail."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ckptengine.errors import CheckpointDamagedError, CheckpointError

__all__ = [
    "DAMAGED",
    "UNREADABLE",
    "console",
    "failures",
    "print_json",
    "printable",
    "ranks_text",
    "shown",
    "size_text",
]

DAMAGED = 1
"""Exit code: bytes are missing or are not those that were written."""
UNREADABLE = 2
"""Exit code: nothing there, not readable, or written by a newer version (click's for wrong usage, too)."""

_PIPE_WIDTH = 200
"""Columns where the output is no terminal: wide enough that grep finds whole lines."""


def console() -> Console:
    """Return where tables go: the standard output, wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


@contextmanager
def failures() -> Iterator[None]:
    """Turn this package's errors into a message on the standard error and the documented exit code."""
    try:
        yield
    except CheckpointError as error:
        click.echo(f"ckptengine: {printable(str(error))}", err=True)
        sys.exit(DAMAGED if isinstance(error, CheckpointDamagedError) else UNREADABLE)


def printable(text: str) -> str:
    """Return a text in which only line breaks are left of what a terminal would act on.

    Names come from checkpoints, which may be anybody's: other control characters, and those that turn the direction of
    writing, are written as `\\u001b` or `\\u202e`, which JSON reads as they were.
    """
    if text.isprintable():
        return text
    return "".join(one if one == "\n" or one.isprintable() else json.dumps(one)[1:-1] for one in text)


def shown(text: str) -> str:
    """Return a text as rich shows it as it is: `printable`, and without markup."""
    return escape(printable(text))


def size_text(nbytes: int | None) -> str:
    """Return bytes as people read them, in binary units."""
    if nbytes is None:
        return "?"
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{nbytes} B" if units[0] == "B" else f"{size:.3g} {units[0]}"


def ranks_text(ranks: tuple[int, ...]) -> str:
    """Return ascending numbers with runs joined: `0-3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(map(str, run)) for run in runs)


def print_json(value: Any) -> None:
    """Print dataclasses, containers and plain values as JSON; what JSON lacks becomes its `repr`."""
    click.echo(printable(json.dumps(_plain(value), indent=2, ensure_ascii=False)))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    return repr(value)
