"""`ckptengine import`: another library's checkpoint as one of ours."""

from __future__ import annotations

import errno

import click

from ckptengine.api import load, save
from ckptengine.cli.export import rule_of
from ckptengine.cli.output import console, failures, shown, size_text
from ckptengine.errors import StorageError
from ckptengine.frameworks.registry import framework
from ckptengine.storage.open import open_storage

__all__ = ["import_checkpoint"]


@click.command("import")
@click.argument("source")
@click.argument("target")
@click.option("--only", multiple=True, metavar="PREFIX", help="Only leaves with such names; repeatable.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Rename, as for `export`; repeatable.")
@click.option("--under", metavar="KEY", help="Put everything under this key of the state, as 'model'.")
def import_checkpoint(
    source: str, target: str, only: tuple[str, ...], rename: tuple[str, ...], under: str | None
) -> None:
    """Convert SOURCE, another library's checkpoint, to TARGET.

    SOURCE is what `show` accepts. TARGET is a directory or a URL that holds no checkpoint yet; `ckptengine.load` and
    `warm_start` read it. It gets checksums. The command needs memory for all arrays. `--only` takes prefixes of the
    names after `--rename`.

    Exit codes: 0 success; 1 a part that must be read is damaged; 2 SOURCE is not readable, or TARGET exists.
    """
    with failures():
        storage = open_storage(target)
        if storage.list():
            raise StorageError(errno.EEXIST, f"{storage.location()} exists already: import to a new place")
        rules = dict(rule_of(rule) for rule in rename) or None
        state = load(source, only=only or None, rename=rules, as_torch=_has_torch())
        done = save(target, {under: state} if under else state)
    console().print(shown(f"{target}: {size_text(done.nbytes)}"), soft_wrap=True)


def _has_torch() -> bool:
    """Whether arrays can be torch's, so that objects which are restored from them are handed tensors."""
    try:
        framework("torch")
    except ModuleNotFoundError:
        return False
    return True
