"""`ckptengine diff`: what differs between two checkpoints."""

from __future__ import annotations

import sys

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ckptengine.cli.export import rule_of
from ckptengine.cli.output import console, failures, print_json, shown
from ckptengine.differences import Comparison
from ckptengine.differences import diff as compare

__all__ = ["diff"]

DIFFERENT = 1
"""Exit code: they differ."""


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--only", multiple=True, metavar="PREFIX", help="Only leaves with such names, as 'model'; repeatable.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Rename in FIRST, as for `export`; repeatable.")
@click.option("--heads", is_flag=True, help="Compare names, dtypes, shapes and plain values, not the arrays' contents.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(first: str, second: str, only: tuple[str, ...], rename: tuple[str, ...], heads: bool, as_json: bool) -> None:
    """Show what differs between the checkpoints FIRST and SECOND.

    Arrays are compared to the bit. Each checkpoint is a run (its newest one is compared), RUN/step-N, a directory that
    `ckptengine.save` wrote, or another library's checkpoint, as for `show`. Per-rank values are not compared.

    Exit codes: 0 they are equal; 1 they differ, or something is damaged; 2 one is not found, or not readable.
    """
    columns = (TextColumn("comparing"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True, highlight=False), transient=True)
    with failures(), bar:
        task = bar.add_task("diff", total=None)
        found = compare(
            first,
            second,
            only=only or None,
            rename=dict(rule_of(rule) for rule in rename) or None,
            contents=not heads,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(found)
    else:
        _print(found, console())
    if found.differences:
        sys.exit(DIFFERENT)


def _print(found: Comparison, to: Console) -> None:
    if found.differences:
        table = Table(box=SIMPLE, pad_edge=False)
        for column in ("name", "differs in", "what"):
            table.add_column(column, overflow="fold")
        for one in found.differences:
            table.add_row(shown(one.name), one.kind, shown(one.text))
        to.print(table)
    names = "1 name differs" if len(found.differences) == 1 else f"{len(found.differences)} names differ"
    to.print(f"{names}; {found.same_arrays} arrays and {found.same_values} plain values are the same")
