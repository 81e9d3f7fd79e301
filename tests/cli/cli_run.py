"""The state that the runs of these tests hold, and the type of the fixture that calls the command."""

from collections.abc import Callable

import numpy as np
from click.testing import Result

import ckptengine as ce

Call = Callable[..., Result]


def state(step: int) -> dict[str, object]:
    generator = np.random.default_rng(step)
    return {
        "model": {
            "weight": generator.standard_normal((600, 100)).astype("f4"),
            "bias": generator.standard_normal(100),
            "empty": np.zeros((0, 3), "i2"),
        },
        "settings": {"rate": 0.125, "names": ["a", "b"], "limit": float("inf"), "raw": b"\x00\x01"},
        "own": ce.PerRank({"cursor": 1000 + step}),
        "step": step,
    }
