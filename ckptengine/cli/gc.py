"""`ckptengine gc`: what dead attempts left, and checkpoints that need not be kept, are deleted."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import click

from ckptengine.catalog.keep import Best, KeepEvery, KeepLast, KeepRule, KeepSteps
from ckptengine.catalog.retention import Leftover, delete_checkpoint, remove_leftovers, superseded
from ckptengine.cli.output import UNREADABLE, console, failures, print_json, printable, shown, size_text
from ckptengine.errors import CheckpointError, CheckpointNotFoundError
from ckptengine.storage.base import Storage, join
from ckptengine.storage.open import open_storage
from ckptengine.storage.parallel import in_parallel
from ckptengine.tiers.memory import MemoryTier, memory_root

__all__ = ["gc"]

_LOOKS = 8  # files that are looked up at once
_WORDS = {
    "checkpoint": "checkpoint",
    "attempt": "data of an attempt that was given up",
    "temporary": "temporary file",
    "upload": "upload that was given up",
    "directory": "empty directory",
    "memory": "images in shared memory",
}


@dataclass(frozen=True, slots=True)
class _Removed:
    """One thing that is gone, or would be; `nbytes` is None for uploads, whose size stores don't list."""

    kind: str
    path: str
    nbytes: int | None


@click.command()
@click.argument("run")
@click.option("--keep-last", type=click.IntRange(min=1), help="Also delete checkpoints, but keep the newest N.")
@click.option("--keep-every", type=click.IntRange(min=1), help="With --keep-last: also keep multiples of N.")
@click.option("--keep-best", metavar="METRIC", help="With --keep-last: also keep the one with the lowest METRIC.")
@click.option("--keep-best-max", metavar="METRIC", help="With --keep-last: also keep the one with the highest METRIC.")
@click.option("--keep-step", multiple=True, type=click.IntRange(min=0), help="With --keep-last: also keep this step.")
@click.option("--memory", is_flag=True, help="Also delete what ended jobs of RUN have left in this machine's /dev/shm.")
@click.option("--dry-run", is_flag=True, help="Only print what would be deleted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(
    run: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: str | None,
    keep_best_max: str | None,
    keep_step: tuple[int, ...],
    memory: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete what dead attempts have left in RUN.

    That is their data, unfinished uploads and temporary files. What a running job writes is left alone, and so is
    everything that is not ckptengine's. With --keep-last checkpoints are deleted, too, as
    `Checkpointer(keep_last=…, keep_every=…)` does. The checkpoint that a job was restored from stays until that job has
    saved, and a manifest that cannot be read stays. With --memory the images in shared memory that ended jobs have left
    for their next start are deleted; those of a running job stay.

    Exit codes: 0 success; 2 RUN is not found or not readable, or something could not be deleted.
    """
    rules: list[KeepRule] = [] if keep_every is None else [KeepEvery(keep_every)]
    rules += [Best(keep_best)] if keep_best else []
    rules += [Best(keep_best_max, mode="max")] if keep_best_max else []
    rules += [KeepSteps(keep_step)] if keep_step else []
    if rules and keep_last is None:
        raise click.UsageError("--keep-every, --keep-best and --keep-step say what else to keep: give --keep-last, too")
    rules += [] if keep_last is None else [KeepLast(keep_last)]
    with failures():
        storage = open_storage(run)
        there = bool(storage.list() or storage.temporaries() or storage.unfinished())
        if not there and not memory:
            raise CheckpointNotFoundError(f"{storage.location()}: nothing is there")
        removed, problems = _collect(storage, rules, dry_run) if there else ([], [])
        if memory:
            removed += _forget(storage, dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "removed": removed, "problems": problems})
    else:
        _print(storage, removed, dry_run)
        for problem in problems:
            click.echo(f"ckptengine: {printable(problem)}", err=True)
    if problems:
        sys.exit(UNREADABLE)


def _collect(storage: Storage, rules: list[KeepRule], dry_run: bool) -> tuple[list[_Removed], list[str]]:
    """Delete, unless it is a `dry_run`, and return what, and what could not be deleted and why."""
    removed: list[_Removed] = []

    def remove(leftover: Leftover) -> None:
        found = _Removed(leftover.kind, storage.location(leftover.name), _nbytes(storage, leftover))
        if not dry_run:
            leftover.delete(storage)
        removed.append(found)

    problems = remove_leftovers(storage, remove)
    old, unread = superseded(storage, rules) if rules else ([], [])
    problems += unread
    for entry, manifest in old:
        nbytes = manifest.nbytes + (storage.size(entry.manifest) or 0)
        try:
            if not dry_run:
                delete_checkpoint(storage, entry, manifest)
        except CheckpointError as error:
            problems.append(f"{storage.location(entry.manifest)} was not deleted: {error}")
        else:
            removed.append(_Removed("checkpoint", storage.location(entry.manifest), nbytes))
    return removed, problems


def _forget(storage: Storage, dry_run: bool) -> list[_Removed]:
    """Delete the run's images in shared memory, unless it is a `dry_run` or a living job has them; return them."""
    root = memory_root(storage.location(), True)
    tier = MemoryTier(root, 0)
    nbytes = tier.left_behind()
    if not nbytes:
        return []
    if not dry_run:
        tier.clear()
    return [_Removed("memory", root, nbytes)]


def _nbytes(storage: Storage, leftover: Leftover) -> int | None:
    name = leftover.name
    if leftover.kind == "upload":
        return None
    files = [name]
    if leftover.kind == "attempt":
        files = [join(name, file) for file in (*storage.list(name), *storage.temporaries(name))]
    sizes: list[int] = []
    in_parallel(lambda file: sizes.append(storage.size(file) or 0), files, _LOOKS)
    return sum(sizes)


def _print(storage: Storage, removed: list[_Removed], dry_run: bool) -> None:
    to = console()
    for one in removed:
        size = "" if one.kind == "directory" else f", {size_text(one.nbytes)}"
        verb = "would delete" if dry_run else "deleted"
        to.print(f"{verb} {shown(one.path)}: {_WORDS[one.kind]}{size}", soft_wrap=True)
    freed = size_text(sum(one.nbytes or 0 for one in removed))
    uploads = sum(one.nbytes is None for one in removed)
    and_uploads = f", and what {uploads} upload{'s' if uploads > 1 else ''} took" if uploads else ""
    if not removed:
        text = "nothing to delete"
    elif dry_run:
        text = f"{freed}{and_uploads} would be freed"
    else:
        text = f"{freed}{and_uploads} freed"
    to.print(f"{shown(storage.location())}: {text}", soft_wrap=True)
