"""Training that goes on where it was: `Resume` for `Model.train`, `DataPosition` for loops of one's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import mindspore as ms
import mindspore.dataset as ds
import mindspore.train as train
from mindspore import nn

from ckptengine.checkpointer import Checkpointer
from ckptengine.errors import CheckpointError, LoadMismatchError
from ckptengine.mindspore.cell import module_entries
from ckptengine.mindspore.parameters import NETWORK, OPTIMIZER, optimizers_of, refuse_split

__all__ = ["DataPosition", "Resume", "training_state"]

_log = logging.getLogger("ckptengine")
# `ds.config.get_seed` gives this where no seed was set: then each process shuffles in an order of its own.
_NO_SEED = 5489
_DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "Dropout1D", "Dropout2D", "Dropout3D")


class DataPosition:
    """Save and restore how many batches of a dataset have been trained, over all epochs; a part of a state.

    `dataset` is the dataset that is iterated, already batched. `step` is the count, which the loop increments. After a
    restore the dataset's next iterator begins after these batches, in the order of an uninterrupted run. This needs the
    same seed of datasets when this object is made (`mindspore.dataset.config.set_seed`; `mindspore.set_seed` sets it,
    too) and the same number of batches in an epoch; both are checked (`LoadMismatchError`). The iterator must be made
    for all epochs (`num_epochs`). If the dataset is iterated for other purposes as well, call
    `dataset.set_init_step(0)` once the iterator is made, since they would begin there, too.
    """

    def __init__(self, dataset: Any) -> None:
        self.step, self._warned = 0, False
        self._dataset, self._seed = dataset, int(ds.config.get_seed())
        self._batches = int(dataset.get_dataset_size())
        if self._batches < 1:
            raise ValueError(f"the dataset has {self._batches} batches in an epoch: there is nothing to train on")

    @property
    def batches(self) -> int:
        """The batches of an epoch."""
        return self._batches

    @property
    def epoch(self) -> int:
        """The epochs that are complete; also the number, from 0 on, of the epoch that goes on."""
        return self.step // self._batches

    def state_dict(self) -> dict[str, int]:
        """Return the position and what it depends on."""
        return {"step": self.step, "batches": self._batches, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load a position; raises `LoadMismatchError` for another dataset or seed."""
        if state["batches"] != self._batches:
            raise LoadMismatchError(
                f"the dataset has {self._batches} batches in an epoch, {state['batches']} when this was saved: the "
                "position means nothing in it. To train a saved model on other data, load "
                f"only=[{NETWORK!r}, {OPTIMIZER!r}] with ckptengine.load"
            )
        if state["seed"] != self._seed:
            raise LoadMismatchError(
                f"the dataset is shuffled with seed {self._seed}, with {state['seed']} when this was saved: samples "
                f"would be skipped and repeated. Call mindspore.dataset.config.set_seed({state['seed']}) before making "
                "it"
            )
        if self._seed == _NO_SEED:
            _log.warning(
                "no seed is set for datasets, so what is shuffled comes in another order after each start: "
                "some samples are skipped and others repeated. Call mindspore.dataset.config.set_seed(number) before "
                "making it"
            )
        self.step = state["step"]
        self.seek()

    def seek(self) -> None:
        """Have the dataset's next iterators begin at the position; `rewind` has them begin at the first batch again."""
        if self.step and (operations := _mapped(self._dataset)):
            # Fast recovery leaves out what was trained before, with the random numbers that its operations drew.
            ds.config.set_fast_recovery(False)
            if any(not type(one).__module__.startswith("mindspore.") for one in operations) and not self._warned:
                self._warned = True
                _log.warning(
                    "the dataset maps Python functions: what they draw from np.random or random is not part of the "
                    "position, so random augmentation in them draws other numbers after this restart than without it. "
                    "MindSpore's own random operations continue exactly"
                )
        self._dataset.set_init_step(self.step)

    def rewind(self) -> None:
        """Have the dataset's next iterators begin at the first batch."""
        self._dataset.set_init_step(0)


def _mapped(dataset: Any) -> list[Any]:
    """Return the operations that a pipeline maps its samples by."""
    own = getattr(dataset, "operations", None) or []
    found = list(own) if isinstance(own, (list, tuple)) else [own]
    for child in getattr(dataset, "children", []):
        found += _mapped(child)
    return found


def training_state(network: nn.Cell) -> dict[str, Any]:
    """Return a training network as a state: weights and everything else under `net`, optimizers under `optimizer`."""
    optimizers = optimizers_of(network)
    own = {id(entry.value) for one in optimizers for entry in module_entries(one, (OPTIMIZER,))}
    state: dict[str, Any] = {
        NETWORK: {e.name: e.value for e in module_entries(network, (NETWORK,)) if e.live and id(e.value) not in own}
    }
    if optimizers:
        state[OPTIMIZER] = optimizers[0] if len(optimizers) == 1 else dict(enumerate(optimizers))
    return state


class Resume(train.Callback):  # type: ignore[misc]
    """Restore a `Model`'s training when it is made, and save it during `Model.train` when a save is due.

        resume = Resume("runs/digits", model, dataset, every=100, keep_last=3)
        model.train(epochs, dataset, callbacks=[resume], initial_epoch=resume.initial_epoch)

    - `run`, `keep_last`, `options`: as for `ckptengine.Checkpointer`.
    - `model`, `dataset`: those of `Model.train`.
    - `every`: a number of steps or a time; by default once per epoch.
    - `state`: more to save, by name, such as `{"rng": ckptengine.RNG()}`.

    Saved and restored are the training network (weights, optimizer with its steps and schedule, loss scale), the step,
    the epoch, the position in `dataset`, and `state`. The newest valid checkpoint is restored in place, even if the
    network was compiled before. Collective: all ranks of a job make it, and train, together. Between trainings signals
    act as without it, and the dataset begins at its first batch.

    `start` is the step that was restored, or None. Raises what `Checkpointer.restore` raises, and `LoadMismatchError`
    for another dataset.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        model: Any,
        dataset: Any,
        every: int | str | None = None,
        keep_last: int | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        network = model.train_network
        self._position = DataPosition(dataset)
        self._state = {**training_state(network), "data": self._position}
        if isinstance(model._loss_scale_manager, train.DynamicLossScaleManager):
            self._state["loss_scale"] = model._loss_scale_manager
        if taken := set(self._state) & set(state or {}):
            raise ValueError(f"state: the names {', '.join(sorted(taken))} are reserved; choose others")
        self._state |= state or {}
        if every is None and options.get("policy") is None:
            every = self._position.batches
        self._checkpointer = Checkpointer(run, every, keep_last, **options)
        self.start = self._checkpointer.restore(self._state)
        self._position.rewind()
        self._base = self._position.step
        self._trained, self._begun, self._within = 0, False, 0
        if self.start is not None:
            _warn_of_random_operators(network)

    @property
    def initial_epoch(self) -> int:
        """The number of complete epochs, to pass to `Model.train`.

        `Model.train` refuses it if it equals the number of epochs to train: then nothing is left to do.
        """
        return self._position.epoch

    @property
    def step(self) -> int:
        """The number of steps trained so far, over all starts of the job."""
        return self._position.step

    def close(self) -> None:
        """Free the memory of the snapshots and of the memory tier; no training is possible with it afterwards.

        Use it if the process continues with other work, or with `memory`. Raises what `Checkpointer.close` raises.
        """
        self._checkpointer.close()

    def __enter__(self) -> Resume:
        """Begin a training: `Model.train` enters its callbacks before it makes its iterator.

        `Model.fit` enters them once more for each validation, within the training.
        """
        self._within += 1
        if self._within == 1:
            self._begun = False
            self._position.seek()
        return self

    def on_eval_begin(self, run_context: Any) -> None:
        """Have an evaluation begin at the dataset's first batch; this comes before it makes its iterator."""
        self._position.rewind()
        self._begun = True

    def on_train_begin(self, run_context: Any) -> None:
        """Count on from what was restored, or trained before by this object."""
        self._base, self._trained, self._begun = self._position.step, 0, True

    def on_train_epoch_begin(self, run_context: Any) -> None:
        """Refuse a training that counts its epochs from elsewhere: it would end too early, or with too many."""
        given, epoch = run_context.original_args(), self._position.epoch
        if not self._trained and given.batch_num == self._position.batches and given.cur_epoch_num != epoch + 1:
            raise ValueError(
                f"Model.train begins with epoch {given.cur_epoch_num - 1} and {epoch} are trained: give it "
                f"initial_epoch=resume.initial_epoch, which is {epoch}, and the number of epochs in all"
            )

    def on_train_step_end(self, run_context: Any) -> None:
        """Save if a save is due."""
        self._position.rewind()  # the training's own iterator is made; others, of an evaluation, begin anew
        if not self._trained:  # now the network is compiled
            refuse_split("Resume", run_context.original_args().train_network, "")
        self._trained = run_context.original_args().cur_step_num
        self._position.step = self._base + self._trained
        self._checkpointer.step(self._position.step, self._state)

    def on_train_end(self, run_context: Any) -> None:
        """Save the end of the training, and wait until it is durable, in `run`."""
        if self._trained:
            self._checkpointer.save(self._position.step, self._state)
        self._checkpointer.flush()

    def __exit__(self, *error: Any) -> None:
        """End a training; where it ends in an exception, wait for the save in flight."""
        self._within -= 1
        if self._within:
            return
        self._position.rewind()
        if not self._begun and self._position.step:
            _log.error(
                "%s: the training did not begin. %d epochs are trained: the epochs that Model.train is given are those "
                "in all, and it needs initial_epoch=resume.initial_epoch",
                self._checkpointer.run,
                self._position.epoch,
            )
        try:
            if error and error[0] is not None:
                self._checkpointer.wait()
        except CheckpointError as problem:
            _log.warning("%s: closing after the training error below failed, too: %s", self._checkpointer.run, problem)
        finally:
            self._checkpointer._pause()


def _warn_of_random_operators(network: nn.Cell) -> None:
    """Say once that dropout draws anew, where that is so: on the CPU the state of its generator can't be had."""
    if ms.get_context("device_target") != "CPU":
        return
    found = sorted({type(cell).__name__ for _, cell in network.cells_and_names() if type(cell).__name__ in _DROPOUTS})
    if found:
        _log.warning(
            "%s: MindSpore %s gives no access to the state of the random operators on the CPU, so after this restart "
            "they draw other numbers than without it: the training remains valid, but is not equal bit for bit",
            ", ".join(found),
            ms.__version__,
        )
