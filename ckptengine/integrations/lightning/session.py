"""One `fit` of a Lightning trainer: what is saved of it and when, and how it goes on after a restart."""

from __future__ import annotations

import copy
import functools
import logging
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from ckptengine.checkpointer import Checkpointer
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.integrations.lightning.loaders import Drawn, Elastic, TrainLoader, set_epoch, train_loader
from ckptengine.integrations.lightning.parts import (
    Averages,
    Metrics,
    OwnPart,
    Part,
    Results,
    hooked,
    overrides,
)
from ckptengine.state.rng import RNG

__all__ = ["Session"]

_log = logging.getLogger("ckptengine")
_REFUSED = {
    "FSDPStrategy": "it is not supported yet; use ModelParallelStrategy with `fully_shard` (FSDP2), or FSDP1 in a "
    "loop of your own",
    "DeepSpeedStrategy": "it is not supported yet; `ckptengine.integrations.deepspeed` is, in a loop of your own",
    "XLAStrategy": "it has not been tried",
    "XLAFSDPStrategy": "it has not been tried",
}
DATA = "data"


class Session:
    """Saves and restores one `fit`.

    A save is made where nothing is half done: after a batch with its validation and schedulers, and, after an epoch's
    last batch, once the epoch's own hooks have run. For that the ends of Lightning's loops are wrapped, on this
    trainer's objects and until the fit ends.

    It has many attributes: Lightning calls it at many places of a fit, and each call leaves there what the next needs.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        hook: Any,
        options: Mapping[str, Any],
        extra: Mapping[str, Any],
        each_epoch: bool,
        after_validation: bool,
    ) -> None:
        refuse_strategy(trainer)
        self.validated = False
        self._trainer, self._module, self._hook = trainer, module, hook
        self._each_epoch, self._after_validation = each_epoch, after_validation
        self._fit, self._epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._averages = Averages(trainer.callbacks)
        self._metrics = Metrics([module, *self._averages.modules()])
        self._results = Results(trainer, self._metrics)
        self._rngs = [RNG(), *(one for one in extra.values() if isinstance(one, RNG))]
        self._mid = False  # whether what is saved next lies in the middle of an epoch
        self._place: dict[str, Any] = {}  # what the restored position depends on
        self._resuming = False
        self._started = False
        self._saved_at = 0  # the trainer's step of the last save point
        self._loaders: list[TrainLoader] = []
        self._whole: list[int | None] = []  # lengths of whole epochs, of loaders that may begin within one
        self._wrapped: list[tuple[Any, str]] = []
        self._parts: list[Part] = []
        self._state = self._whole_state(extra)
        self.checkpointer = Checkpointer(**options)

    def _whole_state(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        trainer = self._trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        state: dict[str, Any] = {"model": self._module}
        for name, several in (
            ("optimizer", list(trainer.optimizers)),
            ("scheduler", schedulers),
            ("average", self._averages.modules()),
        ):
            if several:
                state[name] = several[0] if len(several) == 1 else several
        state["loop"] = Part(self._read_loop, self._give_loop)
        state["callbacks"] = OwnPart(self._read_callbacks, self._give_callbacks)
        state["results"] = OwnPart(self._results.read, self._results.give, Results.anew)
        if trainer.precision_plugin.state_dict():
            state["precision"] = Part(trainer.precision_plugin.state_dict, trainer.precision_plugin.load_state_dict)
        state |= {"rng": self._rngs[0], DATA: {}}
        if taken := set(state) & set(extra):
            raise ValueError(f"Resume(state=…): the names {', '.join(sorted(taken))} are reserved; choose others")
        self._parts = [part for part in state.values() if isinstance(part, Part)]
        self._parts.sort(key=lambda part: part is state["results"])  # given back last, when training begins
        return state | dict(extra)

    # What is saved

    def _read_loop(self) -> dict[str, Any]:
        trainer, fit = self._trainer, self._fit
        progress = fit.state_dict()
        progress["state_dict"].pop("combined_loader", None)
        batches = fit.max_batches
        return {
            "progress": progress,
            "mid_epoch": self._mid,
            "batches": batches if isinstance(batches, int) else None,
            "world_size": trainer.world_size,
            "lists": [loader.lists for loader in self._loaders] or self._place.get("lists", []),
            "should_stop": bool(trainer.should_stop),
            "train_reload": fit._last_train_dl_reload_epoch,
            "val_reload": self._epoch.val_loop._last_val_dl_reload_epoch,
        }

    def _read_callbacks(self) -> dict[str, Any]:
        trainer = self._trainer
        own: dict[str, Any] = {}
        for one in trainer.callbacks:
            if state := one.state_dict():
                own[one.state_key] = state
        states = {"callbacks": own, "hooks": self._added_by_hooks(own)}
        if trainer.datamodule is not None:
            states["datamodule"] = self._hook._call_lightning_datamodule_hook(trainer, "state_dict")
        return states

    def _hooks(self, kind: str) -> list[tuple[str, Callable[[dict[str, Any]], object]]]:
        """Return the hooks `on_save_checkpoint` (or load) of callbacks and module, each with its owner's name."""
        name, trainer, module = f"on_{kind}_checkpoint", self._trainer, self._module
        owners = [one for one in trainer.callbacks if one not in self._averages.callbacks]
        hooks: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
            (type(one).__name__, functools.partial(getattr(one, name), trainer, module))
            for one in owners
            if overrides(name, one, "Callback")
        ]
        if overrides(name, module, "LightningModule"):
            hooks.append((type(module).__name__, getattr(module, name)))
        return hooks

    def _added_by_hooks(self, callbacks: dict[str, Any]) -> dict[str, Any]:
        hooks = self._hooks("save")
        if not hooks:
            return {}
        checkpoint = self._checkpoint(callbacks)
        added: dict[str, Any] = {}
        for owner, hook in hooks:
            added |= hooked(checkpoint, hook, owner)
        return added

    def _checkpoint(self, callbacks: dict[str, Any]) -> dict[str, Any]:
        """Return what Lightning's hooks for checkpoints expect to be given."""
        trainer = self._trainer
        return {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "pytorch-lightning_version": self._hook.pl.__version__,
            "state_dict": self._module.state_dict(),
            "loops": {"fit_loop": self._fit.state_dict()},
            "callbacks": callbacks,
            "optimizer_states": [one.state_dict() for one in trainer.optimizers],
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }

    # What is restored

    def restore(self) -> int | None:
        """Restore all but the place in the data, which has to wait for the loaders; return the step, None at first."""
        early = {name: value for name, value in self._state.items() if name != DATA}
        with self._metrics.aside():
            step = self.checkpointer.restore(early, only=list(early))
        if step is None:
            return None
        self._forget_ckpt_path()
        for part in self._parts[:-1]:
            part.apply()
        self._resuming = True
        self._saved_at = self._trainer.global_step
        return step

    def _give_loop(self, saved: dict[str, Any]) -> None:
        trainer, fit = self._trainer, self._fit
        fit.load_state_dict(copy.deepcopy(saved["progress"]))
        trainer.should_stop = saved["should_stop"]
        self._mid, self._place = saved["mid_epoch"], saved
        if not self._mid:
            self._leave_restart()
        if (trainer.max_epochs or -1) != -1 and trainer.current_epoch > trainer.max_epochs:
            raise LoadMismatchError(
                f"{trainer.current_epoch} epochs are trained already, but Trainer(max_epochs={trainer.max_epochs}) "
                "asks "
                "for fewer; give another run, or more epochs"
            )

    def _give_callbacks(self, saved: dict[str, Any]) -> None:
        trainer, own, hooks = self._trainer, saved["callbacks"], self._hooks("load")
        if hooks:
            checkpoint = self._checkpoint(own) | saved["hooks"]
            for _, hook in reversed(hooks):  # the module's first, as Lightning has it
                hook(checkpoint)
        here = {one.state_key: one for one in trainer.callbacks}
        for key, state in own.items():
            if key in here:
                here[key].load_state_dict(copy.deepcopy(state))
            else:
                _log.warning(
                    "%s: the checkpoint has a state of the callback %s, which this trainer does not have",
                    self._run,
                    key,
                )
        if trainer.datamodule is not None and saved.get("datamodule"):
            self._hook._call_lightning_datamodule_hook(trainer, "load_state_dict", saved["datamodule"])

    def _forget_ckpt_path(self) -> None:
        """Have Lightning restore nothing in this fit: the run's own checkpoint is newer than what `ckpt_path` names."""
        connector, run = self._trainer._checkpoint_connector, self._run
        if connector._loaded_checkpoint:
            _log.warning("%s: continues from its own checkpoint; ckpt_path=%r is ignored", run, connector._ckpt_path)
        connector._loaded_checkpoint, connector._ckpt_path = {}, None

        def refuse(path: Any = None, *_: Any, **__: Any) -> None:
            if path:
                _log.warning("%s: continues from its own checkpoint; ckpt_path=%r is ignored", run, path)

        self._replace(connector, "resume_start", refuse)

    @property
    def _run(self) -> str | os.PathLike[str]:
        return self.checkpointer.run

    # The loops

    def wrap(self) -> None:
        """Wrap the trainer's loops for this fit.

        Loaders that were made already (`trainer.estimated_stepping_batches` does that) are let go: they are made anew
        when the loop begins, with the epoch that was restored.
        """
        fit, epoch = self._fit, self._epoch
        if fit._combined_loader is not None:
            fit._data_fetcher.teardown()
            fit._combined_loader = None
        for loop, name, ours in (
            (fit, "_load_combined_loader_states", self._with_loaders),
            (fit, "on_advance_start", self._with_epoch_start),
            (epoch, "on_run_start", self._with_batches_start),
            (epoch, "on_advance_end", self._with_batch_end),
            (fit, "on_advance_end", self._with_epoch_end),
            (fit, "on_run_end", self._with_end),
        ):
            theirs = getattr(loop, name)
            self._replace(loop, name, lambda *args, ours=ours, theirs=theirs: ours(theirs, *args))
        if self.checkpointer._watch is not None:
            self._replace(self._trainer._signal_connector, "_sigterm_notifier_fn", self._on_sigterm)

    def _replace(self, owner: Any, name: str, function: Any) -> None:
        setattr(owner, name, function)
        self._wrapped.append((owner, name))

    def unwrap(self) -> None:
        """Leave the trainer's loops and loaders as they were."""
        while self._wrapped:
            owner, name = self._wrapped.pop()
            vars(owner).pop(name, None)
        for loader in self._loaders:
            loader.release()
        if self._fit._combined_loader is not None:
            entries = [
                one._loader or one._sampler if isinstance(one, Elastic) else one
                for one in self._fit._combined_loader.flattened
            ]
            self._fit._combined_loader.flattened = entries

    def _on_sigterm(self, number: int, frame: Any) -> None:
        """Take the place of Lightning's handler, which speaks to other ranks from wherever the signal comes.

        Once training is under way the Checkpointer is told of the signal too, and ends all ranks at one step. Before
        that there is nothing to save.
        """
        if not self._started:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _with_loaders(self, theirs: Any) -> None:
        """Take over the training loaders, which were just made, before the first iterator of them is."""
        theirs()
        combined = self._fit._combined_loader
        for loader in self._loaders:
            loader.release()
        self._loaders = [train_loader(number, one) for number, one in enumerate(combined.flattened)]
        _refuse_cycles(combined)
        combined.flattened = [loader.entry for loader in self._loaders]
        self._whole = [len(one) if isinstance(one, Elastic) else None for one in self._loaders]
        self._state[DATA] = {str(number): loader.part for number, loader in enumerate(self._loaders)}
        if not self._resuming:
            return
        with self._metrics.aside():
            self.checkpointer.restore(self._state, only=[DATA])
        if self._mid:
            self._seek()

    def _seek(self) -> None:
        trainer, progress = self._trainer, self._epoch.batch_progress.current
        for loader, lists in zip(self._loaders, self._place["lists"], strict=True):
            if isinstance(loader, Drawn) and self._place["world_size"] != trainer.world_size:
                raise LoadMismatchError(
                    f"{self._run}: saved in the middle of an epoch by {self._place['world_size']} ranks, here are "
                    f"{trainer.world_size}: the samplers of torch and Lightning can't go on there. Restart with as "
                    "many, or use a ckptengine.ElasticSampler, which goes on with any number"
                )
            batches = progress.completed // lists * loader.lists
            progress.ready = progress.started = progress.processed = progress.completed = batches
            loader.seek(batches)
            set_epoch(loader.entry, self._fit.epoch_progress.current.processed)

    def _with_epoch_start(self, theirs: Any) -> None:
        if self._resuming and not self._mid:
            self._go_on()
            for loader in self._loaders:
                loader.rewind()
        theirs()

    def _with_batches_start(self, theirs: Any, fetcher: Any) -> None:
        if type(fetcher).__name__ == "_DataLoaderIterDataFetcher":
            raise StateError(
                "training_step(dataloader_iter) fetches batches itself, so their number is unknown: write "
                "training_step(batch)"
            )
        if not self._resuming:
            for loader in self._loaders:
                loader.begin()
        theirs(fetcher)
        if self._resuming:
            self._check_length()
            self._go_on()

    def _check_length(self) -> None:
        saved, here = self._place["batches"], self._fit.max_batches
        if saved is not None and saved != here and any(isinstance(one, Drawn) for one in self._loaders):
            raise LoadMismatchError(
                f"{self._run}: an epoch had {saved} batches on each rank when it was saved in the middle of one, now "
                f"it has {here}: the data, the batch size or limit_train_batches have changed. Restart with what was, "
                "or from a checkpoint at an epoch's end"
            )

    def _go_on(self) -> None:
        """Begin to train: nothing of the restart is left but the place that was restored."""
        self._resuming = False
        self._leave_restart()
        self._set_length()
        self._fit._last_train_dl_reload_epoch = self._place["train_reload"]
        self._epoch.val_loop._last_val_dl_reload_epoch = self._place["val_reload"]
        self._parts[-1].apply()
        for rng in self._rngs:
            rng.rewind()

    def _set_length(self) -> None:
        """Have the trainer count whole epochs, where a restart has begun within one of an elastic sampler."""
        fit, trainer, combined = self._fit, self._trainer, self._fit._combined_loader
        elastic = [
            (one, whole) for one, whole in zip(self._loaders, self._whole, strict=True) if isinstance(one, Elastic)
        ]
        if not elastic:
            return
        for loader, whole in elastic:
            loader.whole = whole
        fit.max_batches = len(combined)
        for loader, _ in elastic:
            loader.whole = None
        if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
            trainer.val_check_batch = max(1, int(fit.max_batches * trainer.val_check_interval))

    def _leave_restart(self) -> None:
        """Clear the flags by which Lightning would do a part of the last step again, or leave a part out."""
        for loop in (self._fit, self._epoch, self._epoch.val_loop):
            loop.on_iteration_done()
        for loop in vars(self._epoch).values():
            if hasattr(loop, "_restarting"):
                loop.on_iteration_done()

    # When it is saved

    def _with_batch_end(self, theirs: Any, fetcher: Any) -> None:
        theirs(fetcher)
        epoch = self._epoch
        if not epoch._num_ready_batches_reached():  # else the epoch's end is the place to save
            ends = epoch.max_steps != -1 and epoch.global_step >= epoch.max_steps
            self._save_point(mid=True, must=ends)

    def _with_epoch_end(self, theirs: Any) -> None:
        if left := self._results.left():
            _log.warning(
                "%s: %s were logged in this epoch before the restart and not since: they are missing at its end",
                self._run, ", ".join(left),
            )  # fmt: skip
        theirs()
        self._save_point(mid=False, must=self._each_epoch)

    def _save_point(self, mid: bool, must: bool) -> None:
        """Save if a save is due; an optimizer has stepped since the last time, so that no gradients wait."""
        step = self._trainer.global_step
        validated, self.validated = self.validated, False
        if step == self._saved_at:
            return
        self._saved_at, self._mid, self._started = step, mid, True
        metrics = self._numbers() if validated else None
        must = must or (validated and self._after_validation)
        with self._metrics.aside():
            save = self.checkpointer.save if must else self.checkpointer.step
            save(step, self._state, metrics)

    def _numbers(self) -> dict[str, Any]:
        seen = self._trainer._logger_connector._callback_metrics
        return {key: value for key, value in seen.items() if getattr(value, "numel", lambda: 0)() == 1}

    def _with_end(self, theirs: Any) -> None:
        """Save the end of the training before the callbacks' ends: some of them change the weights for good."""
        self._mid = False
        if self._started:
            with self._metrics.aside():
                self.checkpointer.save(self._trainer.global_step, self._state)
        theirs()

    def end(self) -> None:
        """Wait until all is durable, and let go."""
        self.unwrap()
        self.checkpointer.close()

    def fail(self, error: BaseException) -> None:
        """Let go where training ends in an exception."""
        self.unwrap()
        self.checkpointer.__exit__(type(error), error, error.__traceback__)


def refuse_strategy(trainer: Any) -> None:
    """Raise `StateError` for a strategy that keeps weights where they can't be read."""
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _REFUSED:
            raise StateError(f"Resume does not work with {kind.__name__}: {_REFUSED[kind.__name__]}")


def _refuse_cycles(combined: Any) -> None:
    lengths = {len(one) if hasattr(one, "__len__") else None for one in combined.flattened}
    if combined._mode == "max_size_cycle" and len(lengths) > 1:
        raise StateError(
            "training loaders of different lengths are cycled within an epoch, and their positions can't be known; "
            'give CombinedLoader(…, mode="min_size"), or loaders of one length'
        )
