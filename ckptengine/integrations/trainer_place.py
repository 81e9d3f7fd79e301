"""Where a Transformers Trainer is: in the data, in its logs, in its own state; and what it can't be resumed with."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerState

from ckptengine.catalog.keep import Best
from ckptengine.catalog.listing import Entry
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import StateError
from ckptengine.integrations.fetches import Data, Fetches, own
from ckptengine.state.per_rank import PerRank
from ckptengine.state.rng import RNG

__all__ = ["FirstBest", "Place", "Position", "checked_arguments"]

_log = logging.getLogger("ckptengine")

_NOTHING: dict[str, Any] = {"at": None, "best": None, "data": None, "sums": {}, "trainer_state": ""}


@dataclass(frozen=True, slots=True)
class Position:
    """Where the training goes on.

    `batches` of each rank are trained in `epoch`. `ended`: what comes at an epoch's end has been run since.
    `stop` and `epoch_stop`: a callback has ended the training, or the epoch, early.
    """

    epoch: int
    batches: int
    ended: bool
    stop: bool
    epoch_stop: bool


@dataclass(frozen=True, slots=True)
class FirstBest(Best):
    """The best checkpoint by a metric, as the Trainer counts it: of equal ones the older is the better."""

    def kept(self, line: Iterable[tuple[Entry, Manifest]]) -> list[Entry]:
        """Return the best of a line of checkpoints."""
        return Best.kept(self, list(line)[::-1])


class Place:
    """All that a Trainer holds beside model, optimizer, scheduler and random streams; a part of the state.

    It has many attributes: a Trainer keeps its position in local variables, so each of them is followed here.
    """

    def __init__(self, trainer: Any, rng: RNG) -> None:
        self._trainer = trainer
        self.fetches = Fetches(rng)
        self.forget()

    def forget(self) -> None:
        """Begin: nothing is loaded."""
        self.epoch = self.batches = 0
        self.steps_in_epoch = 0
        self.ended = False
        self.grad_norm: Any = None
        self.learning_rate: float | None = None
        self.best: tuple[int, float] | None = None  # the step that was saved with the best metric, and the metric
        self.began: float | None = None  # when this life began to train, on time.time's clock
        self._restored: tuple[Position, Data] | None = None
        self.resuming: Position | None = None
        self._loaded: dict[str, Any] = _NOTHING
        self._seed: int | None = None

    def begin(self, epoch: int, batches: int, steps_in_epoch: int, seed: int | None) -> None:
        """Begin an epoch, or go on in one."""
        self.epoch, self.batches, self.steps_in_epoch, self._seed, self.ended = (
            epoch,
            batches,
            steps_in_epoch,
            seed,
            False,
        )

    @property
    def at_epoch_end(self) -> bool:
        """Whether the epoch's end comes next: all its batches are trained, or something has ended it."""
        control = self._trainer.control
        over = control.should_epoch_stop or control.should_training_stop or self.batches >= self.steps_in_epoch
        return bool(over and not self.ended)

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved, or until the training begins what was loaded."""
        found = self._loaded if self.began is None else self._now()
        return found | {
            "fetches": self.fetches.state_dict(between=found["at"] is None or not found["at"]["batches"]),
            "sums": PerRank(found["sums"], resize=_joined),
            # What the Trainer logs differs between ranks (timings): rank 0's is kept.
            "trainer_state": PerRank(found["trainer_state"], resize=_only, ranks=_first),
        }

    def _now(self) -> dict[str, Any]:
        trainer, control = self._trainer, self._trainer.control
        # A training that has come to its last step is no early stop: with more steps it goes on.
        stop = control.should_training_stop and trainer.state.global_step < trainer.state.max_steps
        # Where something has stopped the training in mid-epoch, the rest of the epoch is what comes next.
        whole = self.batches >= self.steps_in_epoch or control.should_epoch_stop or not control.should_training_stop
        epoch, batches = (self.epoch + 1, 0) if self.ended and whole else (self.epoch, self.batches)
        at = Position(epoch, batches, self.ended, bool(stop), bool(control.should_epoch_stop and not self.ended))
        sums = {
            "tr_loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "initial_step": trainer._initial_global_step,
            "grad_norm": self.grad_norm.item() if isinstance(self.grad_norm, torch.Tensor) else self.grad_norm,
            "learning_rate": self.learning_rate,
            "seconds": time.time() - (self.began or 0.0),
        }
        return {
            "at": asdict(at),
            "best": None if self.best is None else list(self.best),
            "data": asdict(data_of(trainer, self._seed)),
            "sums": sums,
            "trainer_state": trainer_state_of(trainer) if trainer.args.process_index == 0 else "",
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned; the mixin puts each part where the Trainer has it, at its time."""
        self.fetches.load_state_dict(state["fetches"])
        self._loaded = {name: own(value) for name, value in state.items() if name != "fetches"}
        self._restored = Position(**state["at"]), Data(**state["data"])
        self.best = None if state["best"] is None else (int(state["best"][0]), float(state["best"][1]))
        self.began = None

    @property
    def trainer_state(self) -> str:
        """The loaded text of trainer_state.json."""
        return str(self._loaded["trainer_state"])

    @property
    def loaded_seed(self) -> int | None:
        """The seed of the data that was loaded."""
        return None if self._restored is None else self._restored[1].seed

    def resume(self) -> Position | None:
        """Return the loaded position, in batches of this job, or None; the next epoch that is run begins there."""
        if self._restored is None:
            return None
        at, data = self._restored
        batches = at.batches
        if batches:
            here = data_of(self._trainer, data.seed)
            batches = here.batches_of(data, batches, self._trainer.args.gradient_accumulation_steps)
        self.resuming = replace(at, batches=batches)
        return self.resuming

    def put_back(self) -> None:
        """Put back what the Trainer adds up, which it has just begun anew: the training begins."""
        sums, trainer = self._loaded["sums"], self._trainer
        self.began = time.time() - sums.get("seconds", 0.0)
        if sums:
            trainer._tr_loss.fill_(sums["tr_loss"])
            trainer._total_loss_scalar = sums["total_loss"]
            trainer._globalstep_last_logged = sums["last_logged"]
            trainer._initial_global_step = sums["initial_step"]
            self.grad_norm, self.learning_rate = sums["grad_norm"], sums["learning_rate"]


def data_of(trainer: Any, seed: int | None) -> Data:
    """Return what a Trainer's batches are made of."""
    try:
        samples = len(trainer.train_dataset)
    except TypeError:
        samples = -1
    order = "given" if samples < 0 else str(getattr(trainer.args, "train_sampling_strategy", "random"))
    accelerator = trainer.accelerator
    if accelerator.split_batches or accelerator.dispatch_batches or getattr(accelerator, "parallelism_config", None):
        order += ", shared out by batches"  # the ranks' batches are not one after the other
    return Data(samples, int(trainer._train_batch_size), int(trainer.args.world_size), order, seed)


def trainer_state_of(trainer: Any) -> str:
    """Return what Transformers writes into trainer_state.json, with the callbacks' states of now."""
    exporting = [
        one for one in [*trainer.callback_handler.callbacks, trainer.control] if isinstance(one, ExportableState)
    ]
    callbacks = TrainerState(stateful_callbacks=exporting).stateful_callbacks
    # Where the best checkpoint is depends on where the run is.
    state = vars(trainer.state) | {"stateful_callbacks": callbacks, "best_model_checkpoint": None}
    return json.dumps(state, sort_keys=True)


def put_callbacks(trainer: Any) -> list[str]:
    """Put the loaded states into the callbacks that are here, and return the names of those that are not.

    Into the living ones, since the script may hold them; their arguments are the script's.
    """
    loaded = trainer.state.stateful_callbacks
    saved = {name: list(one) if isinstance(one, list) else [one] for name, one in loaded.items()}
    saved.pop(type(trainer.control).__name__, None)
    for callback in trainer.callback_handler.callbacks:
        states = saved.get(type(callback).__name__) if isinstance(callback, ExportableState) else None
        for name, value in (states.pop(0) if states else {}).get("attributes", {}).items():
            setattr(callback, name, value)
    return sorted(name for name, states in saved.items() if states)


def checked_arguments(trainer: Any) -> None:
    """Refuse, by name, what a job can't be resumed with; warn of what is not exact."""
    args = trainer.args
    wrong = {
        "save_only_model": (args.save_only_model, "such a checkpoint can't be resumed; export the weights instead"),
        "ignore_data_skip": (args.ignore_data_skip, "it begins the epoch's data anew; the position is kept here"),
        "auto_find_batch_size": (args.auto_find_batch_size, "the position counts batches, which it changes"),
        "enable_jit_checkpoint": (
            getattr(args, "enable_jit_checkpoint", False),
            "SIGTERM saves here too (docs/preemption.md); leave it out",
        ),
        "deepspeed": (
            trainer.is_deepspeed_enabled,
            "it is not supported yet; it is in a loop of your own (docs/parallelism.md)",
        ),
        "fsdp": (trainer.is_fsdp_enabled, "it is not supported yet; FSDP1 and FSDP2 are, in a loop of your own"),
    }
    found = [f"{name}: {why}" for name, (is_set, why) in wrong.items() if is_set]
    if found:
        raise StateError(f"{type(trainer).__name__}: not with {'; '.join(found)}")
    if isinstance(trainer.train_dataset, torch.utils.data.IterableDataset):
        _log.warning(
            "the training data is an IterableDataset: a resumed job reads it from its beginning and passes over what "
            "was trained, which is exact only where it gives the same samples in each process, and draws no random "
            "numbers; ckptengine.ElasticBatches (docs/streams.md) has a position"
        )
    if args.push_to_hub and getattr(args.hub_strategy, "value", args.hub_strategy) != "end":
        _log.warning(
            "hub_strategy=%s: checkpoints are not pushed to the hub; the model is, at the end", args.hub_strategy
        )


def _joined(values: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """Return the sums for another number of ranks: the Trainer logs the mean of the ranks' losses."""
    return {**values[0], "tr_loss": math.fsum(one["tr_loss"] for one in values) / len(values)}


def _only(values: list[Any], rank: int, world_size: int) -> Any:
    return values[0]


def _first(saved_world_size: int, rank: int, world_size: int) -> tuple[int]:
    return (0,)
