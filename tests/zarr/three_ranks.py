"""A checkpoint that a job of three gloo ranks saves, and what must be found in it.

Run as a script by torchrun with the checkpoint's path it is a rank of that job.
"""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ranks import run_ranks

RANKS = 3

# Rank by rank, the slices of `fragments`: no regular grid has them as its cells.
BOXES = (np.s_[0:5, 0:8], np.s_[5:9, 0:3], np.s_[5:9, 3:8])


def shared() -> dict[str, np.ndarray]:
    """Return the arrays that all ranks share, whole, by their Zarr node."""
    rng = np.random.default_rng(11)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    return {
        "state/model/h.0.weight": normal(10, 6).astype("f4"),
        "state/model/h.0.columns": normal(5, 7).astype(ml_dtypes.bfloat16),
        "state/model/h.0.bias": normal(70).astype(ml_dtypes.bfloat16),
        "state/model/fp8": normal(33).astype(ml_dtypes.float8_e4m3fn),
        "state/model/large": normal(1200, 1100).astype("f4"),
        "state/model/fragments": normal(9, 8).astype("f4"),
        "state/model/pieces": normal(9, 8).astype(ml_dtypes.bfloat16),
        "state/empty": np.zeros((0, 3), "f4"),
        "state/scalar": np.array(2.5, "f8"),
        "state/odd%2Fkey": np.arange(24, dtype="i8").reshape(2, 3, 4).transpose(2, 0, 1),
        "state/items/#0": normal(3) > 0,
        "state/items/#1": (normal(4) + 1j * normal(4)).astype("c8"),
        "state/%5F_half": np.array([np.nan, np.inf, -0.0], "f2"),
    }


def own(rank: int) -> np.ndarray:
    """Return the array that each rank has of its own, at `ranks/<rank>/rng`."""
    return np.arange(rank + 2, dtype="u1")


VALUES = {("step",): 17, ("schedule", "betas"): (0.9, 0.95), ("schedule", "best"): float("inf")}


def checkpoint(factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint, made once in a session."""
    path = factory.getbasetemp() / "three-ranks"
    if not path.exists():
        job = run_ranks(RANKS, __file__, path)
        assert job.returncode == 0, job.stdout[-4000:]
    return path


def main(path: str) -> None:
    import torch
    import torch.distributed as dist

    import ckptengine as ce

    def tensor(array: np.ndarray) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.astype("f4")).to(torch.bfloat16)
        return torch.from_numpy(array)

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    whole = {node.removeprefix("state/"): array for node, array in shared().items()}
    model = {name.removeprefix("model/"): array for name, array in whole.items() if name.startswith("model/")}

    def part(name: str, box: tuple[slice, ...]) -> ce.ShardedArray:
        local = np.ascontiguousarray(model[name][box])
        return ce.ShardedArray(tensor(local), model[name].shape, tuple(side.start for side in box))

    bias = tensor(model["h.0.bias"])
    state = {
        "model": {
            "h.0.weight": part("h.0.weight", np.s_[4 * rank : 4 * rank + 4, 0:6]),
            "h.0.columns": part("h.0.columns", np.s_[0:5, 3 * rank : 3 * rank + 3]),
            "h.0.bias": bias,
            "tied": bias,
            "fp8": torch.from_numpy(model["fp8"].view("u1")).view(torch.float8_e4m3fn),
            "large": tensor(model["large"]),
            "fragments": part("fragments", BOXES[rank]),
            "pieces": part("pieces", BOXES[rank]),
        },
        "empty": tensor(whole["empty"]),
        "scalar": tensor(whole["scalar"]),
        "odd/key": whole["odd%2Fkey"],
        "items": [tensor(whole["items/#0"]), tensor(whole["items/#1"])],
        "__half": tensor(whole["%5F_half"]),
        "step": 17,
        "schedule": {"betas": (0.9, 0.95), "best": float("inf")},
        "rng": ce.PerRank(torch.from_numpy(own(rank))),
        "position": ce.PerRank({"file": f"part-{rank}", "line": 100 * rank}),
    }
    ce.save(path, state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
