"""`ckptengine ls`: the committed checkpoints of a run."""

from __future__ import annotations

import sys

import click
from rich.box import SIMPLE
from rich.table import Table

from ckptengine.cli.output import DAMAGED, console, failures, print_json, shown, size_text
from ckptengine.inspect import CheckpointSummary, list_run

__all__ = ["ls"]


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(run: str, as_json: bool) -> None:
    """List the committed checkpoints of RUN.

    Only manifests are read; `verify` reads the data. A generation counts the starts of the job that have saved: each
    has the next number. The parent is the checkpoint that this one continues, as "STEP of GENERATION".

    Exit codes: 0 success; 1 a manifest is damaged; 2 RUN cannot be read or has no checkpoint.
    """
    with failures():
        checkpoints = list_run(run)
    if as_json:
        print_json(checkpoints)
    else:
        console().print(_table(checkpoints))
    if any(checkpoint.problem is not None for checkpoint in checkpoints):
        sys.exit(DAMAGED)


def _table(checkpoints: list[CheckpointSummary]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for head in ("step", "generation", "parent", "ranks", "size"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("created (UTC)", no_wrap=True)
    metrics = sorted({name for one in checkpoints for name in one.metrics})
    for name in metrics:
        table.add_column(shown(name), justify="right")
    table.add_column("")
    for one in checkpoints:
        step = "-" if one.step is None else str(one.step)
        if one.problem is not None:
            note = f"NOT USABLE: {shown(one.problem)}"
            table.add_row(step, str(one.generation), "", "", "", "", *[""] * len(metrics), note, style="red")
            continue
        parent = "-" if one.parent is None else f"{one.parent[1]} of {one.parent[0]}"
        sizes = str(one.world_size), size_text(one.nbytes)
        note = ", ".join(["newest"] * one.newest + ["a link, never deleted"] * one.linked)
        created = shown((one.created or "")[:16].replace("T", " "))
        values = ["" if (value := one.metrics.get(name)) is None else f"{value:.4g}" for name in metrics]
        table.add_row(step, str(one.generation), parent, *sizes, created, *values, note)
    return table
