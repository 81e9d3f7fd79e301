"""Where a data loader is: what its batches are made of, and the random streams at its fetches, one of them ahead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler

from ckptengine.errors import LoadMismatchError
from ckptengine.state.per_rank import PerRank
from ckptengine.state.rng import RNG

__all__ = ["Data", "Fetches", "batch_sampler_of", "keep_seed", "own", "sampler_of"]

_log = logging.getLogger("ckptengine")

Streams = Mapping[str, NDArray[np.uint8]]


class Fetches:
    """The random streams at the fetches of one loader, which are a part of its position in the data.

    Accelerate's loaders fetch a batch ahead: when step k has been trained, the samples of step k + 1 have been drawn
    (by the dataset, the collator: masks, augmentation), before the dropout of step k. A resumed loader must draw them
    once more from where the streams were then. Samplers may draw their order from the same streams when an epoch
    begins. So two places are kept beside that of the save: where the epoch began, and where the last fetch did.

    `loader` is a DataLoader, or what Accelerate makes of one. With workers, fetches draw in other processes, and only
    the first place is kept; so it is for an IterableDataset, which has no batch sampler.
    """

    def __init__(self, rng: RNG) -> None:
        self._rng = rng
        self._hooked: Any = None
        self._epoch: Streams = {}
        self._ahead: Streams = {}
        self._sampler: Any = None
        self._order: Streams = {}
        self._calls = 0
        self._skip: int | None = None
        self._rewind: Callable[[], object] = lambda: None

    def attach(self, loader: Any) -> None:
        """Follow the fetches of `loader`, whose iteration is about to begin; once for each loader."""
        sampler = batch_sampler_of(loader)
        workers = getattr(loader, "num_workers", 0)
        if workers and getattr(loader, "persistent_workers", False):
            # Their seed is drawn once in a process, at another moment in a restarted one: not from torch's stream.
            inner = getattr(loader, "base_dataloader", loader)
            if inner.generator is None:
                inner.generator = torch.Generator().manual_seed(torch.initial_seed())
        if sampler is None or sampler is self._hooked or workers:
            return
        kind, self._hooked = type(sampler), sampler

        def batches(of: Any) -> Iterator[Any]:
            for batch in kind.__iter__(of):
                if of is self._hooked:
                    self._fetching()
                yield batch

        # `batch_sampler` of a DataLoader can't be set, and iteration asks the class.
        sampler.__class__ = type(kind.__name__, (kind,), {"__iter__": batches, "__module__": kind.__module__})

    def begin(self, sampler: Any = None) -> None:
        """Note where the streams are: an epoch's iterator is about to be made. `sampler` may have its own generator."""
        self._calls, self._skip = 0, None
        self._sampler = sampler
        self._epoch, self._ahead, self._order = self._rng.get_streams(), {}, self._order_now()

    def resume(self, skip: int, rewind: Callable[[], object], sampler: Any = None) -> None:
        """Go to where the loaded epoch began: its iterator is about to be made, with `skip` batches passed over.

        The first fetch is made from where it was made before; `rewind` goes to where the save was, before the second.
        Where there is no second, or nothing to follow, the caller calls it when it has the first batch.
        """
        self._calls, self._skip, self._rewind = 0, skip, rewind
        self._sampler = sampler
        self._rng.set_streams(self._epoch)
        self.set_order(sampler)

    def set_order(self, sampler: Any) -> None:
        """Put a sampler's own generator where the loaded epoch began."""
        generator = _generator_of(sampler)
        if generator is not None and self._order:
            generator.set_state(torch.from_numpy(np.array(self._order["generator"])))

    def _fetching(self) -> None:
        """Called when the batch sampler has said which samples the next batch has."""
        self._calls += 1
        if self._skip is not None:
            if self._calls <= self._skip:
                return
            if self._calls == self._skip + 1:
                self._rng.set_streams(self._ahead)
                return
            self._skip = None
            self._rewind()
        self._ahead = self._rng.get_streams()

    def state_dict(self, between: bool) -> dict[str, Any]:
        """Return the places; each rank's are its own, and mean nothing at another number of ranks.

        `between` says that an epoch has ended: what counts of a sampler's generator is where it is now.
        """
        order = self._order_now() if between else self._order
        places = {"epoch": self._epoch, "ahead": self._ahead, "order": order}
        return {name: PerRank(dict(place), resize=_none) for name, place in places.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, for `resume`."""
        self._epoch, self._ahead, self._order = (dict(own(state[name]) or {}) for name in ("epoch", "ahead", "order"))

    def _order_now(self) -> Streams:
        generator = _generator_of(self._sampler)
        return {} if generator is None else {"generator": generator.get_state().numpy().copy()}


def batch_sampler_of(loader: Any) -> Any:
    """Return what says which samples a loader's batches have, None where nothing does."""
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None and isinstance(getattr(loader, "sampler", None), BatchSampler):
        return loader.sampler
    return sampler


def sampler_of(loader: Any) -> Any:
    """Return the sampler below a loader's batch samplers, None where there is none."""
    sampler = batch_sampler_of(loader)
    while (inner := getattr(sampler, "batch_sampler", None)) is not None:
        sampler = inner
    return getattr(sampler, "sampler", None)


def keep_seed(name: str, sampler: Any, saved: int | None) -> int | None:
    """Return the seed of the order of an epoch's samples, where a sampler has one; a resumed run keeps its own."""
    seed: int | None = getattr(sampler, "initial_seed", None)
    if seed is None or saved is None or saved == seed:
        return seed
    _log.warning(
        "%s: the seed of the data's order is %d here and %d in the checkpoint: the checkpoint's order is used",
        name, seed, saved,
    )  # fmt: skip
    sampler.initial_seed = saved
    return saved


@dataclass(frozen=True, slots=True)
class Data:
    """What a number of batches means: the dataset's length (-1: none), a rank's batch, ranks, order, and its seed."""

    samples: int
    batch: int
    ranks: int
    order: str
    seed: int | None

    def batches_of(self, saved: Data, batches: int, accumulation: int = 1) -> int:
        """Return how many batches here are as many samples as `batches` were where they were saved.

        Raises `LoadMismatchError` where these are not so many whole batches and steps, or not the same samples.
        """
        mine, theirs = (replace(data, seed=None) for data in (self, saved))
        if mine == theirs or not batches:
            return batches
        found, rest = divmod(batches * saved.batch * saved.ranks, self.batch * self.ranks)
        same = (self.samples, self.order) == (saved.samples, saved.order) and self.order in ("random", "sequential")
        if not same or rest or found % accumulation:
            raise LoadMismatchError(
                f"the checkpoint lies {batches} batches into an epoch of {saved}, and here are {self}: no place in "
                "this data. Start with what the run was saved with, or begin another run and load the weights "
                "(Checkpointer.warm_start, docs/resume.md)"
            )
        return found

    def __str__(self) -> str:
        return f"{self.samples} samples, order {self.order}, {self.ranks} ranks with batches of {self.batch}"


def own(value: Any) -> Any:
    """Return what this rank has of a value that may be each rank's own."""
    return value.value if isinstance(value, PerRank) else value


def _none(values: list[Any], rank: int, world_size: int) -> None:
    return None


def _generator_of(sampler: Any) -> Any:
    """Return the generator that a sampler has of its own and goes on with from epoch to epoch, None where none."""
    generator = getattr(sampler, "generator", None)
    # Accelerate's SeedableRandomSampler seeds its generator in each epoch.
    return generator if isinstance(generator, torch.Generator) and not hasattr(sampler, "initial_seed") else None
