"""`ckptengine prefetch`: a checkpoint brought to a local directory before a job starts."""

from __future__ import annotations

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

from ckptengine.catalog.naming import open_checkpoint
from ckptengine.cli.output import console, failures, shown, size_text
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.open import open_storage
from ckptengine.tiers.prefetch import Prefetched
from ckptengine.tiers.prefetch import prefetch as fetch

__all__ = ["prefetch"]


@click.command()
@click.argument("source")
@click.argument("directory")
@click.option("--step", type=click.IntRange(min=0), help="Fetch this step of a run, not the newest.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="Seconds to wait for another prefetch into DIRECTORY.",
)
def prefetch(source: str, directory: str, step: int | None, timeout: float) -> None:
    """Copy the newest checkpoint of SOURCE to a local DIRECTORY.

    SOURCE is a run or a checkpoint, such as s3://bucket/run; credentials come from the environment. Every byte is
    verified. What DIRECTORY already has is not fetched again, and other checkpoints there are left alone. If the newest
    checkpoint is damaged, the previous one is fetched. If SOURCE has none yet, as on the first start of a job, nothing
    is done.

    Exit codes: 0 success; 1 no checkpoint is complete; 2 SOURCE is not readable, or DIRECTORY is full or belongs to
    another run.
    """
    errors = Console(stderr=True, highlight=False)
    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(binary_units=True))
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=errors, transient=True)
    with failures(), bar:
        task = bar.add_task("fetch", total=None)
        target = open_storage(directory)
        if not isinstance(target, LocalStorage):
            raise click.UsageError(f"{target.location()} is not a local directory: give one to fetch to")
        done = fetch(
            open_checkpoint(source),
            target,
            step=step,
            timeout=timeout,
            tell=lambda text: errors.print(f"ckptengine: {shown(text)}", soft_wrap=True),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console().print(shown(_text(source, done)), soft_wrap=True)


def _text(source: str, done: Prefetched | None) -> str:
    if done is None:
        return f"nothing to fetch: {source} has no checkpoint yet"
    which = f"generation {done.generation}" if done.step is None else f"step {done.step}, generation {done.generation}"
    if done.moved_nbytes == 0:
        return f"{done.path}: {which} is already there, {size_text(done.nbytes)}"
    return f"{done.path}: {which}, {size_text(done.moved_nbytes)} fetched of {size_text(done.nbytes)}"
