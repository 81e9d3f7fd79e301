"""Training's data loaders, and how each goes on where it was in the epoch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from ckptengine.data.handing import Handing
from ckptengine.errors import StateError
from ckptengine.frameworks.random_stream import PythonStream, RandomStream
from ckptengine.frameworks.registry import adapters
from ckptengine.state.per_rank import PerRank

__all__ = ["Drawn", "Elastic", "Stateful", "TrainLoader", "train_loader"]


class Elastic:
    """A loader that draws from an `ElasticSampler`, which counts what training is given; it is the loader's place."""

    def __init__(self, sampler: Any, loader: Any) -> None:
        self.part, self._sampler, self._loader = sampler, sampler, loader
        self.done = 0  # batches of this rank that were trained in the epoch when it was restored
        self.whole: int | None = len(sampler)  # the length of a whole epoch, where it is asked for that
        self._length = 0

    def __iter__(self) -> Iterator[Any]:
        done, self.done = self.done, 0
        self.whole, self._length = None, done + len(self._sampler)
        return iter(self._sampler.batches(self._loader))

    def __len__(self) -> int:
        """Return how many batches the epoch has that is iterated, those trained before a restart included."""
        return self._length if self.whole is None else self.whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def entry(self) -> Any:
        """What the trainer iterates."""
        return self

    @property
    def lists(self) -> int:
        """The batches that this rank has of a global batch."""
        cursor = self._sampler._cursor
        return len(cursor.lists_of(cursor.global_batch))

    def seek(self, batches: int) -> None:
        """Go on after `batches` of the epoch."""
        self.done = batches

    def rewind(self) -> None:
        """Go back to what was restored, after a first iterator was made: the sampler has counted nothing."""

    def begin(self) -> None:
        """Begin an epoch: the sampler knows its own place."""

    def release(self) -> None:
        """Leave the loader as it was found."""


class Stateful:
    """A loader with `state_dict` and `load_state_dict`, which knows its place."""

    lists = 1

    def __init__(self, loader: Any) -> None:
        self.entry = loader
        self._own = _Own(_generators_of(loader))
        self.part: Any = {"loader": loader, "own": self._own} if self._own.generators else loader

    def seek(self, batches: int) -> None:
        """Go on after `batches` of the epoch."""

    def rewind(self) -> None:
        """Go back to what was restored, after a first iterator was made."""
        self._own.rewind()

    def begin(self) -> None:
        """Begin an epoch: the loader knows its own place."""

    def release(self) -> None:
        """Leave the loader as it was found."""


class _Own:
    """The generators of a loader and its samplers."""

    def __init__(self, generators: dict[str, RandomStream]) -> None:
        self.generators = generators
        self._restored: dict[str, NDArray[np.uint8]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return their states, which are each rank's own."""
        return {"states": PerRank({name: one.get() for name, one in self.generators.items()}, resize=_first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set them."""
        self._restored = {name: np.array(data) for name, data in state["states"].items() if name in self.generators}
        self.rewind()

    def rewind(self) -> None:
        """Set them once more to what was restored."""
        for name, data in self._restored.items():
            self.generators[name].set(data)


class Drawn:
    """A `DataLoader` whose sampler has no state: the random numbers at the epoch's first draw give its order again.

    On the way to the place in the epoch only the sampler is drawn from: no sample is loaded twice.
    """

    lists = 1

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.entry = loader
        self.part = self
        self._name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._inner = getattr(loader, self._name)
        self._own = _Own(_generators_of(loader))
        self._begun: dict[str, NDArray[np.uint8]] = {}
        self._skip: int | None = None
        vars(loader)[self._name] = _Draws(self, self._inner)  # DataLoader forbids the plain assignment

    def state_dict(self) -> dict[str, Any]:
        """Return the random streams as they were when the epoch's order was drawn, and the loader's own as they are."""
        return {"begun": PerRank(self._begun, resize=_first), "own": self._own.state_dict()["states"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the loader's own generators, and remember how the epoch began."""
        self._begun = {name: np.array(data) for name, data in state["begun"].items()}
        self._own.load_state_dict({"states": state["own"]})

    def seek(self, batches: int) -> None:
        """Have the next iteration begin after `batches` of the epoch."""
        self._skip = batches

    def rewind(self) -> None:
        """Go back to what was restored, after a first iterator was made."""
        self._own.rewind()

    def begin(self) -> None:
        """Begin an epoch: the next iteration begins at its first batch."""
        self._skip = None

    def draws(self) -> Iterator[Any]:
        """Yield what the sampler draws; the rest of it in an epoch that goes on."""
        skip, self._skip = self._skip, None
        if not skip:
            self._begun = {name: stream.get() for name, stream in self._streams().items()}
            yield from self._inner
            return
        now = {name: (stream, stream.get()) for name, stream in _process_streams().items()}
        for name, stream in self._streams().items():
            if name in self._begun:
                stream.set(self._begun[name])
        drawn = iter(self._inner)
        for _ in range(skip):
            next(drawn, None)
        for stream, data in now.values():
            stream.set(data)
        yield from drawn

    def release(self) -> None:
        """Give the loader its own sampler back."""
        vars(self.entry)[self._name] = self._inner

    def _streams(self) -> dict[str, RandomStream]:
        return _process_streams() | self._own.generators


TrainLoader = Elastic | Stateful | Drawn


class _Draws:
    """Stands for a loader's sampler, or batch sampler."""

    def __init__(self, drawn: Drawn, inner: Any) -> None:
        self._drawn, self._inner = drawn, inner

    def __iter__(self) -> Iterator[Any]:
        return self._drawn.draws()

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_inner", "_drawn"):
            raise AttributeError(name)
        return getattr(self._inner, name)


def train_loader(number: int, loader: Any) -> TrainLoader:
    """Return how a loader goes on.

    Raises `StateError` for one that has no place that could be gone back to.
    """
    places = (loader, getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None))
    sampler = next((one for one in places if isinstance(one, Handing)), None)
    if sampler is not None:
        return Elastic(sampler, None if sampler is loader else loader)
    if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
        if _length(loader) is None:
            raise StateError(
                f"training loader {number}: {type(loader).__name__} has no length, so Lightning takes one batch ahead "
                "of training, and the loader's own position would be that of the batch after; give it a `__len__`"
            )
        return Stateful(loader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return Drawn(loader)
    dataset = f" over {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else ""
    raise StateError(
        f"training loader {number}: {type(loader).__name__}{dataset} has no position that could be saved, so a restart "
        "would repeat samples; give it `state_dict` and `load_state_dict`, as torchdata's StatefulDataLoader has, or "
        "take a map-style dataset, with a ckptengine.ElasticSampler where the number of ranks may change"
    )


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader's samplers the epoch, as Lightning does."""
    of_batches = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    samplers = {id(one): one for one in (getattr(loader, "sampler", None), of_batches)}
    for sampler in samplers.values():
        tell = getattr(sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _process_streams() -> dict[str, RandomStream]:
    streams: dict[str, RandomStream] = {"python": PythonStream(random._inst)}
    for adapter in adapters():
        streams |= adapter.random_streams()
    return streams


def _generators_of(loader: Any) -> dict[str, RandomStream]:
    """Return the generators of a loader and its samplers, each once."""
    batches = getattr(loader, "batch_sampler", None)
    samplers = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found: dict[int, Any] = {}
    for one in samplers:
        for name in ("generator", "rng", "_rng"):
            generator = getattr(one, name, None)
            if isinstance(generator, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
                found.setdefault(id(generator), generator)
    return {f"generator {number}": _stream_of(one) for number, one in enumerate(found.values())}


def _stream_of(generator: Any) -> RandomStream:
    if isinstance(generator, random.Random):
        return PythonStream(generator)
    streams: Iterable[RandomStream | None] = (adapter.random_stream_of(generator) for adapter in adapters())
    return next(stream for stream in streams if stream is not None)


def _first(saved: list[Any], rank: int, world_size: int) -> Any:
    return saved[0]
