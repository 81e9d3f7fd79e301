"""A training state whose every byte follows from the step, and what the directory of a run must look like."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

import ckptengine as ce
from ckptengine.inspect import list_run

LAYERS = 7
ELEMENTS = (1 << 17) + 24
"""Elements of a layer: a little more than 1 MiB, so that layers are stored aligned, the rest packed."""


def fill(state: dict[str, Any], step: int) -> None:
    """Train to a step: in place, as a framework does."""
    for number, layer in enumerate(state["model"].values()):
        layer[:] = np.arange(layer.size, dtype=np.uint64) * np.uint64(2 * step + 1) + np.uint64(number)
    state["small"][0][:] = np.float32(step) / np.arange(1, 8, dtype=np.float32)
    state["progress"].update(step=step, text="x" * (step % 50), rate=1.0 / (step + 1))


def state_at(step: int, elements: int = ELEMENTS) -> dict[str, Any]:
    """Return the state of a step."""
    state: dict[str, Any] = {
        "model": {f"layer{number}": np.zeros(elements, np.uint64) for number in range(LAYERS)},
        "small": [np.zeros(7, np.float32), np.zeros((0, 3))],
        "progress": {"step": 0, "text": "", "rate": 0.0},
    }
    fill(state, step)
    return state


def same(found: Any, expected: Any) -> bool:
    """Whether two states are equal, type for type and byte for byte."""
    if isinstance(expected, np.ndarray):
        return (
            isinstance(found, np.ndarray)
            and (found.dtype, found.shape) == (expected.dtype, expected.shape)
            and found.tobytes() == expected.tobytes()
        )
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def committed_steps(run: str | os.PathLike[str], known: Container[int] = ()) -> list[int]:
    """Return the steps that are listed, in order, after loading each: all must be whole and hold their step.

    Those that are `known` to be whole are not loaded again.
    """
    if not any(Path(run).glob("step-*/manifest-*.json")):
        return []
    listed = list_run(run)
    for summary in listed:
        assert summary.problem is None, summary.problem
        assert summary.step is not None
        if summary.step in known:
            continue
        elements = ce.load(summary.path, only=["model.layer0"])["model"]["layer0"].size
        assert same(ce.load(summary.path), state_at(summary.step, elements)), summary.path
    return [summary.step for summary in listed if summary.step is not None]


def files_of(run: str | os.PathLike[str]) -> list[str]:
    """Return all files below a run."""
    return sorted(str(path.relative_to(run)) for path in Path(run).rglob("*") if path.is_file())


def age(run: str | os.PathLike[str], seconds: float = 1000.0) -> None:
    """Make everything in a run older: what has no living owner then is a leftover."""
    for path in (Path(run), *Path(run).rglob("*")) if Path(run).exists() else ():
        status = path.stat()
        os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))
