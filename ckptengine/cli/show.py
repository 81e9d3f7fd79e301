"""`ckptengine show`: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ckptengine.cli.output import console, failures, print_json, ranks_text, shown, size_text
from ckptengine.inspect import CheckpointDescription, describe

__all__ = ["show"]

_VALUE_WIDTH = 100
"""Characters of a plain value that the table shows; `--json` gives the whole."""

_FILES = 8
"""Names of files of another library's checkpoint that are listed."""


@click.command()
@click.argument("checkpoint")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only leaves with such names, as 'model.*'; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, values in full.")
def show(checkpoint: str, only: tuple[str, ...], as_json: bool) -> None:
    """Show the leaves and plain values of CHECKPOINT.

    CHECKPOINT is a run (its newest checkpoint is shown), RUN/step-N, a directory that `ckptengine.save` wrote, a
    safetensors file, a Hugging Face or DCP directory, or a torch.save file.

    \b
    placement   replicated: the same on all ranks, stored once
                whole: one rank's is stored, as torch does with buffers
                sharded: each rank has a part
                per_rank: each rank has its own, and all are stored
    archives    ranks whose files (rank-N.zarr.zip) hold parts of it (for other libraries: file numbers)
    generation  counts the starts of the job that have saved: each has the next number

    Exit codes: 0 success; 1 a part that must be read is damaged; 2 nothing found, or not readable.
    """
    with failures():
        description = _filtered(describe(checkpoint), only)
    if as_json:
        print_json(description)
    else:
        _print(description, console())


def _filtered(description: CheckpointDescription, only: tuple[str, ...]) -> CheckpointDescription:
    """Return a description of what has a name that one of the patterns matches; without patterns, of all."""
    if not only:
        return description

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in only)

    def of(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if wanted(name)}

    found = replace(
        description,
        leaves=tuple(leaf for leaf in description.leaves if wanted(leaf.name)),
        values=of(description.values),
        rank_values={rank: of(values) for rank, values in description.rank_values.items()},
        unread=of(description.unread),
    )
    if not (found.leaves or found.values or any(found.rank_values.values()) or found.unread):
        raise click.UsageError(f"{description.path}: no leaf has a name like {' or '.join(only)}")
    return found


def _print(description: CheckpointDescription, to: Console) -> None:
    parent, foreign = description.parent, bool(description.files)
    ours = {
        "step": "-" if description.step is None else str(description.step),
        "generation": str(description.generation),
        "parent": "-" if parent is None else f"step {parent[1]}, generation {parent[0]}",
        "ranks": str(description.world_size),
    }
    theirs = {"format": f"{description.format}, without checksums", "files": _files(description.files)}
    facts = {
        "checkpoint": description.path,
        **(theirs if foreign else ours),
        "size": size_text(description.nbytes),
        **({} if foreign else {"created": description.created}),
        **{
            f"metrics.{key}": "not finite" if value is None else f"{value:.6g}"
            for key, value in description.metrics.items()
        },
        **{f"metadata.{key}": _short(value) for key, value in description.metadata.items()},
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(f"[bold]{shown(name)}[/]", shown(fact))
    to.print(table)

    table = Table(box=SIMPLE, pad_edge=False, title="Arrays", title_justify="left")
    # Names need the room first: as many columns as the longest, if there are that many.
    longest = max((len(leaf.name) for leaf in description.leaves), default=0)
    table.add_column("leaf", overflow="fold", min_width=min(longest, 40))
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("placement", no_wrap=True)
    table.add_column("files" if foreign else "archives")
    for leaf in description.leaves:
        shape = " × ".join(map(str, leaf.shape)) or "scalar"
        size, archives = size_text(leaf.nbytes), ranks_text(leaf.archives)
        table.add_row(shown(leaf.name), leaf.dtype, shape, size, leaf.placement, archives)
    total = sum(leaf.nbytes for leaf in description.leaves)
    table.caption = f"{len(description.leaves)} arrays, {size_text(total)}"
    table.caption_justify = "left"
    to.print(table)

    if description.values:
        to.print(_values("Plain values", description.values))
    for rank, values in sorted(description.rank_values.items()):
        if values:
            to.print(_values(f"Plain values of rank {rank}", values))
    if description.unread:
        to.print(_values("Not read: neither arrays nor plain values", description.unread))


def _files(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= _FILES else f"{names[0]} … {names[-1]}, {len(names)} in all"


def _values(title: str, values: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(shown(name), shown(_short(value)))
    return table


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_WIDTH else f"{text[:_VALUE_WIDTH]}… ({len(text)} characters)"
