"""Ranks with a torchdata StatefulDataLoader each: `save` trains and saves, `resume` goes on from it.

python loader_job.py FOLDER save|resume, under torchrun. Only the first two processes train.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import torch
from groups import group, report
from torch import distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import ckptengine as ce

CONSUMED, EPOCH = 5, 13  # batches of a rank: at the save, and in an epoch


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 97

    def __getitem__(self, index: int) -> int:
        return index


class Counting(torch.utils.data.IterableDataset):
    """Each worker's own stream, with a state of its own, that holds a tensor, a number and bytes."""

    def __init__(self, rank: int) -> None:
        self.rank, self.next = rank, 0

    def __iter__(self) -> Counting:
        info = torch.utils.data.get_worker_info()
        self.worker = info.id if info else 0
        return self

    def __next__(self) -> int:
        if self.next >= 26:
            raise StopIteration
        self.next += 1
        return 10_000 * self.rank + 1000 * self.worker + self.next

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "tensor": torch.tensor([self.next]), "bytes": bytes([self.next])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["tensor"].tolist() == [state["next"]]
        assert state["bytes"] == bytes([state["next"]])
        self.next = state["next"]


def loaders(**options: Any) -> dict[str, StatefulDataLoader]:
    """Return a loader of a map-style and one of an iterable data set, with workers that fetch ahead."""
    options = {"num_workers": 2, "prefetch_factor": 3, "batch_size": 4, **options}
    generator = torch.Generator().manual_seed(3)
    sampler = StatefulDistributedSampler(Numbers(), shuffle=True, seed=5)
    return {
        "map": StatefulDataLoader(Numbers(), sampler=sampler, generator=generator, **options),
        # The save comes two batches after a snapshot of this one.
        "iterable": StatefulDataLoader(
            Counting(dist.get_rank()), generator=generator, snapshot_every_n_steps=3, **options
        ),
    }


def rest(loader: StatefulDataLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def save(folder: Path) -> dict[str, Any]:
    state = loaders()
    found: dict[str, Any] = {}
    with ce.Checkpointer(folder / "run") as ckpt:
        iterators = {name: iter(loader) for name, loader in state.items()}
        for name, iterator in iterators.items():
            found[name] = {"before": [next(iterator).tolist() for _ in range(CONSUMED)]}
        ckpt.save(CONSUMED, state).durable.result(60)
        for name, iterator in iterators.items():
            found[name]["after"] = [batch.tolist() for batch in iterator]
    return found


def resume(folder: Path) -> dict[str, Any]:
    state = loaders()
    with ce.Checkpointer(folder / "run") as ckpt:
        assert ckpt.restore(state) == CONSUMED
        return {name: rest(loader) for name, loader in state.items()}


def refused(folder: Path, **options: Any) -> str:
    state = loaders(**options)
    with ce.Checkpointer(folder / "run") as ckpt:
        try:
            ckpt.restore(state)
        except ce.errors.LoadMismatchError as error:
            return str(error)
    return "restored"


def main() -> None:
    folder, phase = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with group(f"two-{phase}", 2) as mine:
        if mine:
            found["two"] = save(folder) if phase == "save" else resume(folder)
            if phase == "resume":
                found["workers"] = refused(folder, num_workers=0, prefetch_factor=None)
    if phase == "resume":
        with group("three", 3):
            found["three"] = refused(folder)
    report(folder, found)


if __name__ == "__main__":
    main()
