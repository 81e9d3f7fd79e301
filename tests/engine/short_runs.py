"""Runs of a few small steps, and what lies in them."""

from pathlib import Path

import numpy as np

import ckptengine as ce


def state_at(step):
    return {"a": np.arange(3000.0) + step, "step": step}


def blank():
    return state_at(-1)


def save_steps(run, steps, **options):
    with ce.Checkpointer(run, every=1, timeout=20, **options) as ckpt:
        for step in steps:
            ckpt.step(step, state_at(step))
        ckpt.wait()
        return [stats.step for stats in ckpt.history]


def steps_in(run):
    """Return the steps that have a manifest."""
    return [int(path.name[5:]) for path in sorted(Path(run).glob("step-*")) if list(path.glob("manifest-*"))]


def restored(run, step=None):
    """Restore into a new Checkpointer and return the step, after a look at every element."""
    state = blank()
    with ce.Checkpointer(run, timeout=20) as ckpt:
        found = ckpt.restore(state, step)
    if found is not None:
        assert state["step"] == found
        assert np.array_equal(state["a"], state_at(found)["a"])
    return found


def file_of(run, step, pattern):
    (path,) = Path(run).glob(f"step-{step:08d}/{pattern}")
    return path


def archive(run, step):
    return file_of(run, step, "data-*/rank-00000.zarr.zip")
