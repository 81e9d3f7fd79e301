"""Saves random streams on some ranks, loads them on others, and reports what each rank draws."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from groups import group, process_rank, report

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.errors import ReplicaMismatchError


class Streams:
    """What a rank draws from: `torch.cpu` and `common` are the same on all ranks at first, the others are its own."""

    def __init__(self, seed: int) -> None:
        self.common, self.own = np.random.default_rng(seed), torch.Generator().manual_seed(seed + process_rank())
        random.seed(seed + process_rank())
        np.random.seed(seed + process_rank())
        torch.manual_seed(seed)
        self.draw()

    def draw(self) -> dict[str, list[float]]:
        return {
            "python": [random.random(), random.gauss(0, 1)],
            "numpy": [np.random.random(), np.random.randn()],
            "torch.cpu": torch.randn(3).tolist(),
            "common": self.common.random(2).tolist(),
            "own": torch.rand(2, generator=self.own).tolist(),
        }

    def rng(self, **options: object) -> ce.RNG:
        return ce.RNG({"common": self.common, "own": self.own}, **options)


def main() -> None:
    folder, found = Path(sys.argv[1]), {}
    torch.set_num_threads(1)

    def saved(name: str, path: str, **options: object) -> None:
        streams = Streams(100)
        ce.save(folder / path, {"rng": streams.rng(**options)}, timeout=60)
        found[name] = streams.draw()

    def loaded(name: str, path: str, then: str | None = None, **options: object) -> None:
        streams = Streams(7000)
        rng = streams.rng(**options)
        ce.load(folder / path, into={"rng": rng}, timeout=60)
        if then:
            ce.save(folder / then, {"rng": rng}, timeout=60)
        found[name] = streams.draw()

    with group("three", 3) as mine:
        if mine:
            saved("saved", "three")
            loaded("three", "three")
            try:
                saved("mistaken", "mistaken", shared=["python"])
            except ReplicaMismatchError as error:
                found["refused"] = str(error)
    for size in (2, 4):
        with group(f"on {size}", size) as mine:
            if mine:
                loaded(f"on {size}", "three")
                loaded(f"again on {size}", "three")
                if size == 4:
                    loaded("keyed", "three", key=process_rank() // 2)
    with group("one", 1) as mine:
        if mine:
            loaded("one", "three", then="one")
            saved("alone", "alone")
    with group("two of one", 2) as mine:
        if mine:
            loaded("two of one", "one")
            loaded("two of alone", "alone")
            assert current().world_size == 2
    report(folder, found)


if __name__ == "__main__":
    main()
