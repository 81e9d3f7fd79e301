"""The state that hostile checkpoints are made of, and all ways to read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ckptengine as ce
from ckptengine.archive.directory import read_directory, read_entry
from ckptengine.errors import CheckpointError
from ckptengine.inspect import describe, list_run, verify
from ckptengine.load.choose import newest_checkpoint
from ckptengine.storage.local import LocalStorage

SECRET = b"a secret outside of the checkpoint" * 1000


def state(tied: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    tied = np.arange(700.0) if tied is None else tied
    return {
        "a": np.arange(100_000, dtype=np.float32).reshape(100, 1000),
        "b": tied,
        "c": tied,
        "list": [np.ones(3), 1],
        "step": 5,
        "own": ce.PerRank({"seed": 1, "x": np.ones(5)}),
    }


def read_all(place: Path) -> list[BaseException | None]:
    """Read a checkpoint in every way that there is; return what each raised. Only CheckpointErrors come out."""
    ways: list[Callable[[], object]] = [
        lambda: ce.load(place),
        lambda: ce.load(place, into=state(np.zeros(700))),
        lambda: ce.load(place, into=state(np.zeros(700)), strict=False),
        lambda: list_run(place),
        lambda: describe(place),
        lambda: verify(place),
        lambda: walk(place),
    ]
    raised: list[BaseException | None] = []
    for way in ways:
        try:
            way()
            raised.append(None)
        except CheckpointError as error:
            raised.append(error)
            assert "a secret" not in str(error)  # noqa: PT017
    return raised


def walk(place: Path) -> None:
    """Read the archives by their central directories, as the Zarr store does."""
    checkpoint = newest_checkpoint(LocalStorage(place))
    archive = checkpoint.archive(0)
    for name, entry in read_directory(archive).items():
        read_entry(archive, name, entry, 0, entry.nbytes)


def refused(place: Path) -> str:
    """Read a checkpoint that must not be loadable; return the message."""
    first, second, *_ = read_all(place)
    assert first is not None
    assert second is not None
    return str(first)
