"""Exact resume for the Trainer of Hugging Face Transformers: `class MyTrainer(Resume, transformers.Trainer)`."""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, _is_peft_model
from transformers.trainer_utils import get_last_checkpoint

from ckptengine.catalog.keep import KeepLast
from ckptengine.checkpointer import Checkpointer
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError, StateError
from ckptengine.integrations.fetches import keep_seed, sampler_of
from ckptengine.integrations.trainer_place import (
    FirstBest,
    Place,
    checked_arguments,
    put_callbacks,
)
from ckptengine.policy.rules import Policy
from ckptengine.state.rng import RNG

__all__ = ["Resume"]

_log = logging.getLogger("ckptengine")
_STEP_DIRECTORY = re.compile(r"step-(\d+)/*")


class Resume:
    """Give a Trainer asynchronous checkpoints and exact resume: a mixin that comes before the Trainer.

        class MyTrainer(Resume, transformers.Trainer):
            pass

        trainer = MyTrainer(model, args, train_dataset=data)
        trainer.train()  # the same line at the first start and at each restart

    - `run`: the run directory or URL; by default `args.output_dir`.
    - `checkpointer`: further arguments of `ckptengine.Checkpointer`, such as `{"local": "/ckpt", "every": "10min"}`.
    - `whole_model`: save all of a `PeftModel`; by default only its adapters are saved (under `adapters`).
    - All other arguments are the Trainer's.

    The Trainer's own `save_strategy` and `save_steps` say when to save. `save_total_limit` keeps that many of the
    newest checkpoints and, with `load_best_model_at_end`, also the best one. Saved are the model, the optimizer, the
    scheduler, the scaler, the random streams of each rank, the states of the Trainer and its callbacks, the sums for
    the next log, and the position in the data. Killed in mid-epoch and started again, the training ends with the
    weights, optimizer and logged losses of one that ran through (docs/huggingface.md says when). SIGTERM acts as
    docs/preemption.md says.

    `train(resume_from_checkpoint)`: None (the default) continues from the newest checkpoint of the run, or starts if
    there is none. True does the same, but raises `ValueError` if there is none; if only Transformers' own
    `checkpoint-…` directories exist, it starts from the newest of them. False starts over, on a branch of its own. A
    string is a step of the run (`runs/gpt/step-00000100`), from which the run continues, or one of Transformers' own
    directories, from which the run starts if it has no checkpoint yet.

    `save_model` and `from_pretrained` are unchanged. Raises `StateError` for settings with which a resumed job can't be
    exact, or whose state is not saved: see docs/huggingface.md.

    Half of its attributes are the Trainer's, named here for the type checker.
    """

    args: Any
    model: Any
    state: Any
    control: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    callback_handler: Any
    _tr_loss: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(Resume):
            raise TypeError(
                f"class {cls.__name__}: write class {cls.__name__}(Resume, Trainer): Resume must come first"
            )

    def __init__(
        self,
        *args: Any,
        run: str | os.PathLike[str] | None = None,
        checkpointer: Mapping[str, Any] | None = None,
        whole_model: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._whole_model = whole_model
        checked_arguments(self)
        self.run = os.fspath(self.args.output_dir if run is None else run)
        self._adapters: Any = None
        self._options = dict(checkpointer or {})
        self._rng = RNG()
        self._place = Place(self, self._rng)
        self._checkpointer: Checkpointer | None = None
        self._found: _Found | None = None  # the checkpoint of ours that is resumed
        self._step: int | None = None  # the step of the run that was asked for
        self._metrics: tuple[int, dict[str, float]] = (-1, {})
        self.callback_handler.callbacks.insert(0, _Moments(self))  # first: before any callback draws a random number

    # ---- Finding a checkpoint ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the Trainer does, from the run's newest checkpoint; see the class."""
        if trial is not None:
            raise StateError("hyperparameter search is not supported, because each trial would need a run of its own")
        with (
            Checkpointer(self.run, **self._checkpointer_options()) as checkpointer,
            tempfile.TemporaryDirectory(prefix="ckptengine-") as directory,
        ):
            self._place.forget()
            self._checkpointer, self._found = checkpointer, None
            if self._find(checkpointer, resume_from_checkpoint):
                self._found, resume_from_checkpoint = _Found(checkpointer, directory), directory
                self._write_trainer_state(directory)
            elif not isinstance(resume_from_checkpoint, str):
                resume_from_checkpoint = self._foreign(resume_from_checkpoint)
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)  # type: ignore[misc]

    def _find(self, checkpointer: Checkpointer, asked: str | bool | None) -> bool:
        """Load the Trainer's place from the run's newest checkpoint, or that which was asked for; False: none."""
        self._step = None
        if asked is False:
            return False
        if isinstance(asked, str):
            path = Path(asked)
            if os.path.isfile(path / TRAINER_STATE_NAME):
                _log.info("%s: starts from %s, because the run has no checkpoint yet", self.run, asked)
            elif (name := _STEP_DIRECTORY.fullmatch(path.name)) is not None and path.parent == Path(self.run):
                self._step = int(name.group(1))
            else:
                raise CheckpointNotFoundError(
                    f"resume_from_checkpoint={asked!r} is neither a step of {self.run}, such as "
                    f"{os.path.join(self.run, 'step-00000100')}, nor a checkpoint of Transformers, which has a "
                    f"{TRAINER_STATE_NAME}"
                )
        try:
            step = checkpointer.restore({"trainer": self._place}, self._step, only=["trainer"])
        except CheckpointNotFoundError:
            if asked is None or self._step is not None:
                raise
            return False  # there are Transformers' own, and one of them was asked for
        return step is not None

    def _foreign(self, asked: bool | None) -> str | None:
        """Return Transformers' own newest checkpoint where `True` asks for one; raise `ValueError` as it does."""
        if not asked:
            return None
        own = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
        if own is None:
            raise ValueError(f"resume_from_checkpoint=True: there is no checkpoint in {self.run}")
        _log.info("%s: starts from %s", self.run, own)
        return str(own)

    def _write_trainer_state(self, directory: str) -> None:
        """Put the Trainer's state where the Trainer reads it from."""
        Path(directory, TRAINER_STATE_NAME).write_text(self._place.trainer_state, encoding="utf-8")

    def _checkpointer_options(self) -> dict[str, Any]:
        """Return the Checkpointer's arguments: what is kept is as the Trainer's say, unless its own do."""
        options = dict(self._options)
        if {"policy", "keep_last", "keep_every", "keep_best"} & options.keys():
            return options
        rules: list[Any] = [] if self.args.save_total_limit is None else [KeepLast(max(1, self.args.save_total_limit))]
        if rules and self.args.load_best_model_at_end:
            rules.append(FirstBest(self._best_metric, mode="max" if self.args.greater_is_better else "min"))
        return options | {"policy": Policy(save=Policy.of(options.pop("every", None)).save, keep=rules), "every": None}

    @property
    def _best_metric(self) -> str:
        name = str(self.args.metric_for_best_model)
        return name if name.startswith("eval_") else f"eval_{name}"

    # ---- Resuming: the Trainer's own steps, in its order ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]
        except _OlderError:  # what the Trainer has computed is of the newer one: all of it once more
            return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def _ours(self, checkpoint: str | None) -> _Found | None:
        """Return the checkpoint of ours for which a directory stands; None where it stands for none."""
        return self._found if self._found is not None and self._found.directory == checkpoint else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._ours(resume_from_checkpoint) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        counted = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial
        )
        at = None if self._ours(resume) is None else self._place.resume()
        if at is None:
            epochs, batches = counted
            return int(epochs), int(batches)
        self.state.best_model_checkpoint = self._best_path()
        return at.epoch, at.batches

    def _load_callback_state(self) -> None:
        if self._found is None:
            super()._load_callback_state()  # type: ignore[misc]
            return
        left = put_callbacks(self)
        if left:
            _log.warning(
                "%s: the checkpoint has states of callbacks that this trainer does not have; they are ignored: %s",
                self.run,
                ", ".join(left),
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        found = self._ours(checkpoint)
        if found is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        before = self._place.trainer_state
        found.checkpointer.restore(self._whole(), self._step)
        if self._place.trainer_state != before:
            self._write_trainer_state(found.directory)
            raise _OlderError

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._ours(checkpoint) is None:
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._ours(checkpoint) is None:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        else:
            self._rng.rewind()

    # ---- The loop ----

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, steps_in_epoch: int, **rest: Any) -> None:
        place = self._place
        at, place.resuming = place.resuming, None
        sampler = sampler_of(train_dataloader)
        seed = keep_seed(self.run, sampler, place.loaded_seed)
        place.begin(epoch, 0 if at is None else at.batches, steps_in_epoch, seed)
        if at is not None and (at.stop or self.state.global_step >= self.state.max_steps):
            self.control.should_training_stop = True
            if at.ended:
                return
        if at is not None and not at.ended and (place.at_epoch_end or at.epoch_stop):
            # The epoch's last batch was trained before the save; what comes at its end was not yet run.
            place.fetches.set_order(sampler)
            self._rng.rewind()
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(
                self._tr_loss, place.grad_norm, rest["model"], rest["trial"], epoch, rest["ignore_keys_for_eval"],
                rest["start_time"], learning_rate=place.learning_rate,
            )  # fmt: skip
            return
        place.fetches.attach(train_dataloader)
        if at is not None and at.batches:
            place.fetches.resume(at.batches, self._rng.rewind, sampler)
        else:
            if at is not None:
                place.fetches.set_order(sampler)
            place.fetches.begin(sampler)
        super()._run_epoch(  # type: ignore[misc]
            epoch=epoch, train_dataloader=train_dataloader, steps_in_epoch=steps_in_epoch, **rest
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of the next step, and count them."""
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._place.batches += len(found[0])
        return found

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if skip_scheduler and self._place.resuming is not None:
            return {}  # `eval_on_start`: the training has begun before
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)  # type: ignore[misc]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._metrics = self.state.global_step, numbers
        return bool(super()._determine_best_metric(metrics, trial))  # type: ignore[misc]

    # ---- Saving ----

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: int, *args: Any, **kwargs: Any
    ) -> None:
        place = self._place
        place.grad_norm, place.learning_rate = grad_norm, kwargs.get("learning_rate")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)  # type: ignore[misc]
        if self._checkpointer is not None and not place.at_epoch_end:  # else the end calls this once more
            self._checkpointer.step(self.state.global_step, self._whole(), self._known_metrics())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._checkpointer is None:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        self.store_flos()  # type: ignore[attr-defined]
        self._count_best()
        self._checkpointer.save(self.state.global_step, self._whole(), self._known_metrics())

    def _known_metrics(self) -> dict[str, float] | None:
        step, metrics = self._metrics
        return metrics if step == self.state.global_step else None

    def _count_best(self) -> None:
        """Note whether the step that is about to be saved is the best of those that were."""
        value = (self._known_metrics() or {}).get(self._best_metric, math.nan)
        best = self._place.best
        better = best is None or (value > best[1] if self.args.greater_is_better else value < best[1])
        if better and not math.isnan(value):
            self._place.best = self.state.global_step, float(value)
            self.state.best_model_checkpoint = self._best_path()

    def _best_path(self) -> str | None:
        best = self._place.best
        return None if best is None else os.path.join(self.run, f"step-{best[0]:08d}")

    def _whole(self) -> dict[str, Any]:
        """Return the state: what is saved and restored."""
        optimizer = self.optimizer
        whole = self._weights() | {
            "optimizer": getattr(optimizer, "optimizer", optimizer),  # without Accelerate's wrapper
            "scheduler": self.lr_scheduler,
            "rng": self._rng,
            "trainer": self._place,
        }
        scaler = getattr(self.accelerator, "scaler", None)
        return whole if scaler is None else whole | {"scaler": scaler}

    def _weights(self) -> dict[str, Any]:
        if self._whole_model or not _is_peft_model(self.model):
            return {"model": self.model}
        if self._adapters is None:
            from ckptengine.integrations.peft import Adapters

            self._adapters = Adapters(self.model)
        return {"adapters": self._adapters}

    def _load_best_model(self) -> None:
        if self._place.best is None or self._checkpointer is None:
            super()._load_best_model()  # type: ignore[misc]
            return
        weights = self._weights()
        try:
            self._checkpointer.restore(weights, self._place.best[0], only=list(weights))
        except (CheckpointNotFoundError, CheckpointDamagedError) as error:
            raise type(error)(f"load_best_model_at_end: the best checkpoint can't be loaded: {error}") from error

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # it deletes Transformers' own
        began = self._place.began  # of all steps and their loss, also of those before a restart
        try:
            return super()._finalize_training(  # type: ignore[misc]
                trial, num_train_samples, start_time if began is None else began
            )
        finally:
            self.args.save_total_limit = limit


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint of ours that is resumed; to the Trainer it is a `directory` with its own state in it."""

    checkpointer: Checkpointer
    directory: str


class _OlderError(Exception):
    """The newest checkpoint is damaged, and the one before was restored."""


class _Moments(TrainerCallback):  # type: ignore[misc]
    """Tells the mixin of moments for which the Trainer has no method."""

    def __init__(self, trainer: Resume) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put back what has been added up for the next log: the Trainer has just begun it anew."""
        self._trainer._place.put_back()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go to the random streams of the save where an epoch begins with it."""
        at = self._trainer._place.resuming
        if at is not None and not at.batches:
            self._trainer._rng.rewind()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that what is saved from here on is the epoch's end."""
        self._trainer._place.ended = True
