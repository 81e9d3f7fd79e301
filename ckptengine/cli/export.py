"""`ckptengine export`: a checkpoint in the format of another library."""

from __future__ import annotations

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ckptengine.api import export as export_checkpoint
from ckptengine.cli.output import console, failures, shown, size_text
from ckptengine.comm.select import join
from ckptengine.export.run import FORMATS, ExportReport

__all__ = ["export", "rule_of"]

_SHOWN = 6


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--to", type=click.Choice(FORMATS), default="safetensors", show_default=True, help="Format of TARGET.")
@click.option("--step", type=click.IntRange(min=0), help="Export this step of a run, not the newest.")
@click.option("--only", multiple=True, metavar="PREFIX", help="Only leaves with such names, as 'model'; repeatable.")
@click.option(
    "--rename",
    multiple=True,
    metavar="OLD=NEW",
    help="Rename by prefix, as 'model=', or by pattern, as 'h.*.attn=layers.*.attention'; repeatable.",
)
@click.option("--dtype", metavar="DTYPE", help="Write floating arrays as bfloat16, float16, float32 or float64.")
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Most bytes of arrays in one safetensors file."
)
def export(
    source: str,
    target: str,
    to: str,
    step: int | None,
    only: tuple[str, ...],
    rename: tuple[str, ...],
    dtype: str | None,
    max_shard_size: str,
) -> None:
    """Write SOURCE to TARGET in another format.

    SOURCE is a run (its newest checkpoint is exported), RUN/step-N, a directory that `ckptengine.save` wrote, or
    another library's checkpoint, as for `show`. Every byte that is read is verified. TARGET must not exist yet.

    \b
    safetensors  TARGET is a directory, for files as Hugging Face names them, or FILE.safetensors; arrays only
    torch        TARGET is a file, for torch.load(weights_only=True): arrays and plain values
    dcp          TARGET is a directory, for torch.distributed.checkpoint.load: arrays and plain values
    zarr         TARGET is a directory, or FILE.zip: arrays, and plain values as attributes of the group
    mindspore    TARGET is a file, for mindspore.load_checkpoint: arrays only

    Under torchrun (torchrun --nproc-per-node 4 -m ckptengine export …) or mpiexec, the processes share the shards of a
    safetensors directory.

    Exit codes: 0 success; 1 a part that must be read is damaged; 2 nothing found, not readable, or TARGET exists.
    """
    with failures():
        comm = join()
    errors = Console(stderr=True, highlight=False, quiet=comm.rank != 0)
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(binary_units=True))
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=errors, transient=True)
    with failures(), bar:
        task = bar.add_task("export", total=None)
        try:
            report = export_checkpoint(
                source,
                target,
                to=to,
                step=step,
                only=only or None,
                rename=dict(rule_of(rule) for rule in rename) or None,
                dtype=dtype,
                max_shard_size=max_shard_size,
                comm=comm,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except ValueError as error:
            if type(error) is ValueError:
                raise click.UsageError(str(error)) from None
            raise
    if comm.rank == 0:
        console().print(shown(_text(report)), soft_wrap=True)


def rule_of(text: str) -> tuple[str, str]:
    """Return a rule of `--rename`."""
    old, sign, new = text.partition("=")
    if not sign:
        raise click.UsageError(f"--rename {text!r}: write OLD=NEW")
    return old, new


def _text(report: ExportReport) -> str:
    files = report.files[0] if len(report.files) == 1 else f"{len(report.files)} files"
    lines = [f"{report.target}: {files}, {report.arrays} arrays, {size_text(report.nbytes)}"]
    for what, names in (("plain values", report.left_out_values), ("names of tied arrays", report.left_out_tied)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"left out, as {report.format} has none: {what}: {', '.join(names[:_SHOWN])}{more}")
    if report.left_out_own:
        lines.append(f"left out: {report.left_out_own} arrays that ranks have of their own")
    return "\n".join(lines)
