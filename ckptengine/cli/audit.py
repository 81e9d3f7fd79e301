"""`ckptengine audit`: whether a run used every sample of its data once, over all restarts."""

from __future__ import annotations

import sys

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ckptengine.audit import AuditReport, CursorReport
from ckptengine.audit import audit as audit_run
from ckptengine.cli.output import DAMAGED, console, failures, print_json, shown

__all__ = ["audit"]


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--deep", is_flag=True, help="Also compare every byte of the checkpoints with its checksums.")
def audit(run: str, as_json: bool, deep: bool) -> None:
    """Prove that RUN used every sample exactly once.

    Starts at the newest checkpoint and follows its parents. Each checkpoint's ledger of samples must continue the
    previous one, contain every position of each finished epoch once, and agree with the digests of what all ranks
    handed to training.

    Exit codes: 0 proven; 1 there are findings; 2 no checkpoint with a data cursor, or not readable.
    """
    columns = (TextColumn("hashing samples"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with failures(), bar:
        task = bar.add_task("audit", total=None)
        report = audit_run(run, deep=deep, progress=lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        print_json({"clean": report.clean, "report": report})
    else:
        _print(report)
    if not report.clean:
        sys.exit(DAMAGED)


def _print(report: AuditReport) -> None:
    to = console()
    for cursor in report.cursors:
        to.print(_lives(cursor))
        for line in cursor.proven:
            to.print(f"[green]PROVEN[/] {shown(line)}", soft_wrap=True)
        for line in cursor.notes:
            to.print(f"NOTE   {shown(line)}", soft_wrap=True)
    for finding in report.findings:
        name = "" if finding.cursor is None else f"{finding.cursor}: "
        where = _between(*finding.between)
        to.print(f"[red]{finding.kind.upper()}[/] {shown(f'{name}{where}: {finding.message}')}", soft_wrap=True)
    checkpoints = f"{len(report.checkpoints)} checkpoint{'' if len(report.checkpoints) == 1 else 's'}"
    if report.clean:
        text = f"[green]{shown(report.path)}: {checkpoints}, nothing lost, nothing repeated[/]"
    else:
        text = f"[red]{shown(report.path)}: {checkpoints}, {len(report.findings)} finding(s)[/]"
    to.print(text, soft_wrap=True)


def _between(before: int | None, after: int | None) -> str:
    if before == after and before is not None:
        return f"step {before}"
    if after is None:
        return "before the newest checkpoint" if before is None else f"after step {before}"
    return f"before step {after}" if before is None else f"between steps {before} and {after}"


def _lives(cursor: CursorReport) -> Table:
    order = ", ".join(f"{key} {value}" for key, value in cursor.order.items() if isinstance(value, int | str))
    epochs = "1 finished epoch" if cursor.finished_epochs == 1 else f"{cursor.finished_epochs} finished epochs"
    title = f"{cursor.name}: {order}; {epochs}, then {cursor.consumed} samples"
    table = Table(box=SIMPLE, pad_edge=False, title=shown(title), title_justify="left")
    for head in ("life", "generation", "steps", "ranks", "global batches", "epochs", "samples", "padding", "left out"):
        table.add_column(head, justify="right", no_wrap=True)
    for life in cursor.lives:
        table.add_row(
            str(life.life),
            "-" if life.generation is None else str(life.generation),
            "-" if life.steps is None else _span(life.steps),
            str(life.world_size),
            _span(life.batches),
            _span(life.epochs),
            str(life.samples),
            str(life.padding),
            str(life.left_out),
        )
    return table


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] >= ends[1] else f"{ends[0]}-{ends[1]}"
