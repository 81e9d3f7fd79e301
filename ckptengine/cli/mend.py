"""`ckptengine mend`: a run that an older version has split is one again."""

from __future__ import annotations

import os

import click

from ckptengine.catalog.life import check_unused
from ckptengine.cli.output import failures
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.open import open_storage
from ckptengine.tiers.memory import memory_root
from ckptengine.tiers.mend import mend as make_one

__all__ = ["mend"]


@click.command()
@click.argument("run")
@click.argument("directory")
def mend(run: str, directory: str) -> None:
    """Rejoin RUN and its local tier DIRECTORY after a lost reply.

    Older versions claimed a generation twice, once in each place, if RUN failed just after it had accepted the claim.
    The next start then says that DIRECTORY holds another run. Only claims that one process made for one start are made
    equal, also for images in this machine's /dev/shm; nothing is deleted. Run it on every node whose DIRECTORY is
    refused, while no job writes to the run; otherwise it changes nothing.

    Exit codes: 0 success; 2 a job writes to the run, these are two runs, or they cannot be read or written.
    """
    with failures():
        storage = open_storage(run)
        check_unused(storage, "Call `ckptengine mend`")
        places = [storage, LocalStorage(directory)]
        root = memory_root(storage.location(), True)
        changed = make_one([*places, LocalStorage(root)] if os.path.isdir(root) else places)
    for line in changed:
        click.echo(line)
    if not changed:
        click.echo("nothing to mend: all claims are equal")
