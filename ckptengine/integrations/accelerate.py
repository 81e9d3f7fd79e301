"""Exact resume for loops that Hugging Face Accelerate has prepared: their state, and where their loaders are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.integrations.fetches import Data, Fetches, keep_seed, sampler_of
from ckptengine.state.rng import RNG

__all__ = ["Prepared"]

_log = logging.getLogger("ckptengine")


class Prepared:
    """Save and resume a loop that an `Accelerator` has prepared: `state()` for a Checkpointer, `batches` for the loop.

        model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
        loop = Prepared(accelerator)
        with ce.Checkpointer("runs/gpt", every=100) as ckpt:
            step = ckpt.restore(loop.state()) or 0
            while loop.epoch(loader) < epochs:
                for batch in loop.batches(loader):  # the rest of the epoch
                    with accelerator.accumulate(model):
                        ...
                    if accelerator.sync_gradients:
                        step += 1
                        ckpt.step(step, loop.state())

    Make it after the last `prepare` and `register_for_checkpointing`.

    - `accelerator`: the `Accelerator`.
    - `rng`: a `ckptengine.RNG` with generators of your own; by default `RNG()`.

    Raises `StateError` for backends that keep the state to themselves (DeepSpeed, Megatron-LM), and for
    `use_stateful_dataloader`.
    """

    def __init__(self, accelerator: Accelerator, rng: RNG | None = None) -> None:
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise StateError(
                f"{accelerator.distributed_type}: it keeps its state in its own engine, which is not saved here"
            )
        if any(getattr(loader, "use_stateful_dataloader", False) for loader in accelerator._dataloaders):
            raise StateError(
                "use_stateful_dataloader: leave it out. The position in the data is kept here, and a loader of "
                "torchdata does not go on in its order when Accelerate skips batches of it"
            )
        self._accelerator = accelerator
        self._rng = RNG() if rng is None else rng
        self._loaders = [
            _Loader(accelerator, self._rng, loader, n) for n, loader in enumerate(accelerator._dataloaders)
        ]
        self._counters = _Counters(accelerator)

    def state(self) -> dict[str, Any]:
        """Return the state: models, optimizers, schedulers, loaders, scaler, registered objects, random streams.

        One model is `model`, several are `model.0`, `model.1`, in the order of `prepare`; so are optimizers and
        schedulers. Loaders (`data`) and registered objects (`registered`) always have their numbers.
        """
        accelerator = self._accelerator
        parts = {
            "model": [_bare(accelerator, model) for model in accelerator._models],
            "optimizer": [one.optimizer for one in accelerator._optimizers],
            "scheduler": [one.scheduler for one in accelerator._schedulers],
        }
        state: dict[str, Any] = {name: one[0] if len(one) == 1 else one for name, one in parts.items() if one}
        rest = {"data": self._loaders, "registered": list(accelerator._custom_objects)}
        state |= {name: found for name, found in rest.items() if found}
        scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler}
        return state | scaler | {"accelerator": self._counters, "rng": self._rng}

    def epoch(self, loader: Any) -> int:
        """Return how many epochs of a prepared loader are complete."""
        return self._of(loader).epoch

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches of the rest of the epoch from a prepared loader, and count each one that is handed out.

        After a restore the random streams are those of the save when the first batch is yielded. Raises `ValueError`
        for a loader that was not prepared before, `LoadMismatchError` if the loader does not have the restored
        position.
        """
        return self._of(loader).rest()

    def _of(self, loader: Any) -> _Loader:
        found = next((one for one in self._loaders if one.loader is loader), None)
        if found is None:
            raise ValueError("batches(loader): take the loader that `prepare` returned, before Prepared was made")
        return found


def _bare(accelerator: Accelerator, model: Any) -> Any:
    """Return a model without wrappers; FSDP1's stays, which alone knows where its parameters are."""
    inner = model
    while not isinstance(inner, FullyShardedDataParallel):
        if not hasattr(inner, "module") and not hasattr(inner, "_orig_mod"):
            return accelerator.unwrap_model(model)
        inner = getattr(inner, "_orig_mod", None) or inner.module
    return inner


class _Loader:
    """Where one loader is."""

    def __init__(self, accelerator: Accelerator, rng: RNG, loader: Any, number: int) -> None:
        self.loader = loader
        self.epoch = self._batches = 0
        self._accelerator, self._rng, self._name = accelerator, rng, f"loader {number}"
        self._fetches = Fetches(rng)
        self._loaded = False
        self._data = self._here(None)
        if isinstance(loader.dataset, IterableDataset):
            _log.warning(
                "%s has an IterableDataset: after a restart it is read from its beginning and what was trained is "
                "passed over, which is exact only where it gives the same samples in each process, and draws no random "
                "numbers; ckptengine.ElasticBatches (docs/streams.md) has a position",
                self._name,
            )

    def _here(self, seed: int | None) -> Data:
        """Return what a batch of this loader is made of."""
        loader, sampler = self.loader, sampler_of(self.loader)
        try:
            samples = len(loader.dataset)
        except TypeError:
            samples = -1
        known = {RandomSampler: "random", SequentialSampler: "sequential"}
        order = next((name for kind, name in known.items() if isinstance(sampler, kind)), type(sampler).__name__)
        ranks = self._accelerator.num_processes
        return Data(samples, max(1, (loader.total_batch_size or 1) // ranks), ranks, order, seed)

    def rest(self) -> Iterator[Any]:
        """Yield the rest of the epoch."""
        loader, sampler, loaded, self._loaded = self.loader, sampler_of(self.loader), self._loaded, False
        saved, self._data = self._data, self._here(keep_seed(self._name, sampler, self._data.seed))
        self._batches = self._data.batches_of(saved, self._batches)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.epoch)
        self._fetches.attach(loader)
        if loaded:
            self._rng.rewind()  # an evaluation before the training draws, too
        here = self._rng.get_streams()
        rewound = not (loaded and self._batches)

        def rewind() -> None:
            nonlocal rewound
            if not rewound:
                self._rng.set_streams(here)
            rewound = True

        if not rewound:
            self._fetches.resume(self._batches, rewind, sampler)
        else:
            if loaded:
                self._fetches.set_order(sampler)
            self._fetches.begin(sampler)
        for batch in skip_first_batches(loader, self._batches) if self._batches else loader:
            rewind()
            self._batches += 1
            yield batch
        rewind()
        self.epoch, self._batches = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, batches of each rank, what a batch is, and the streams at the fetches."""
        return {
            "epoch": self.epoch,
            "batches": self._batches,
            "data": asdict(self._data),
            "fetches": self._fetches.state_dict(between=not self._batches),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned; raises `LoadMismatchError` where it is no place in this loader's data."""
        saved = Data(**state["data"])
        self._here(saved.seed).batches_of(saved, state["batches"])
        self._fetches.load_state_dict(state["fetches"])
        self.epoch, self._batches, self._data, self._loaded = state["epoch"], state["batches"], saved, True


class _Counters:
    """What an Accelerator counts itself: the batches since gradients were last used."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        """Return the count; raises `StateError` in the middle of an accumulation, whose gradients are not saved."""
        accelerator = self._accelerator
        if accelerator.step and not accelerator.sync_gradients:
            raise StateError(
                "save where accelerator.sync_gradients is True: in the middle of an accumulation there are gradients, "
                "which are not saved"
            )
        return {"step": accelerator.step, "accumulation": accelerator.gradient_accumulation_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the count; raises `LoadMismatchError` where another number of batches is accumulated now."""
        here = self._accelerator.gradient_accumulation_steps
        if state["accumulation"] != here and state["step"] % here:
            raise LoadMismatchError(
                f"gradient_accumulation_steps={here} here, {state['accumulation']} in the checkpoint, which lies "
                f"{state['step']} batches into an epoch: no whole number of steps. Restart with what it was saved with"
            )
        self._accelerator.step = state["step"]
