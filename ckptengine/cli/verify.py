"""`ckptengine verify`: every byte against the checksums."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ckptengine.cli.output import DAMAGED, console, failures, print_json, shown, size_text
from ckptengine.inspect import Problem
from ckptengine.inspect import verify as verify_checkpoint

__all__ = ["verify"]

_LEAVES_SHOWN = 8


@click.command()
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(checkpoint: str, as_json: bool) -> None:
    """Compare every byte of CHECKPOINT with its checksums.

    CHECKPOINT is a run (all of its checkpoints are verified), RUN/step-N, or a directory that `ckptengine.save` wrote.
    Each damaged place is printed with the leaves that it affects.

    Exit codes: 0 no damage; 1 something is damaged; 2 nothing found, or not readable.
    """
    total = 0
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(binary_units=True))
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    with failures(), bar:
        task = bar.add_task("verify", total=None)

        def progress(done: int, whole: int) -> None:
            nonlocal total
            total = whole
            bar.update(task, completed=done, total=whole)

        problems = verify_checkpoint(checkpoint, progress)
    if as_json:
        print_json({"verified_nbytes": total, "problems": problems})
    else:
        _print(checkpoint, total, problems)
    if problems:
        sys.exit(DAMAGED)


def _print(checkpoint: str, total: int, problems: list[Problem]) -> None:
    to = console()
    for problem in problems:
        to.print(f"[red]DAMAGED[/] {shown(problem.message)}", soft_wrap=True)
        if problem.leaves:
            more = len(problem.leaves) - _LEAVES_SHOWN
            names = ", ".join(problem.leaves[:_LEAVES_SHOWN]) + (f" and {more} more" if more > 0 else "")
            to.print(f"        leaves: {shown(names)}", soft_wrap=True)
    if problems:
        to.print(
            f"[red]{shown(checkpoint)}: {len(problems)} damaged place(s) in {size_text(total)}[/]",
            soft_wrap=True,
        )
    else:
        to.print(f"[green]{shown(checkpoint)}: {size_text(total)} verified, no damage[/]", soft_wrap=True)
