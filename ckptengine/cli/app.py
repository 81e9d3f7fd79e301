"""The group of commands."""

from __future__ import annotations

import importlib.metadata

import click

from ckptengine.cli.audit import audit
from ckptengine.cli.diff import diff
from ckptengine.cli.export import export
from ckptengine.cli.gc import gc
from ckptengine.cli.import_checkpoint import import_checkpoint
from ckptengine.cli.ls import ls
from ckptengine.cli.mend import mend
from ckptengine.cli.prefetch import prefetch
from ckptengine.cli.show import show
from ckptengine.cli.verify import verify

__all__ = ["app"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("ckptengine"))
def app() -> None:
    """List, verify, compare, export, import, fetch and delete checkpoints.

    Exit codes: 0 success; 1 something is damaged or differs; 2 wrong usage, nothing found, or not readable.
    """


app.add_command(audit)
app.add_command(import_checkpoint)
app.add_command(diff)
app.add_command(export)
app.add_command(gc)
app.add_command(ls)
app.add_command(mend)
app.add_command(prefetch)
app.add_command(show)
app.add_command(verify)
