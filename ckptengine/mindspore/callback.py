"""`CheckpointConfig` and `ModelCheckpoint` with MindSpore's signatures, over this engine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import mindspore.train as train

from ckptengine.errors import CheckpointError, SaveFailedError, StateError
from ckptengine.mindspore.checkpoint import SLICES, check_appended, progress_of, refuse_encryption, settle, start_save
from ckptengine.mindspore.files import Checkpoints, numbered_name
from ckptengine.mindspore.parameters import refuse_split, state_of
from ckptengine.save.handle import SaveHandle
from ckptengine.save.saver import DEFAULT_TIMEOUT
from ckptengine.storage.open import local_path

__all__ = ["CheckpointConfig", "ModelCheckpoint"]

_log = logging.getLogger("ckptengine")


class CheckpointConfig(train.CheckpointConfig):  # type: ignore[misc]
    """Configure `ModelCheckpoint`, with the arguments and properties of MindSpore's own `CheckpointConfig`.

    - `save_checkpoint_steps` or `save_checkpoint_seconds`: when to save.
    - `keep_checkpoint_max` (the newest by epoch and step) or `keep_checkpoint_per_n_minutes`: what to keep.
    - `saved_network`, `append_info`: what to save. `exception_save`: also save when an exception ends the training.
    - `format`: the ending of the names.
    - `async_save`, `remove_redundancy` and `crc_check` change nothing: saves are always asynchronous, without
      redundancy, and checked. Parameters are never merged: with `integrated_save`, a network whose parameters are split
      over devices raises `StateError`.

    Raises `ValueError` for `enc_key` and `incremental`, and what MindSpore's own raises.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        refuse_encryption("CheckpointConfig", self.enc_key)
        if self.map_param_inc:
            raise ValueError("CheckpointConfig: incremental=True is for MapParameter, which ckptengine does not save")


class ModelCheckpoint(train.Callback):  # type: ignore[misc]
    """Save the training network in the background when a save is due, by this process alone.

    - `prefix`, `directory`: strings, or functions of the callback's parameters. Ranks that save at the same time need a
      directory each.
    - `config`: a `CheckpointConfig`.

    A checkpoint is a directory called `<prefix>-<epoch>_<step in epoch>.ckpt`, with leading zeros. Epochs and steps are
    counted on from the checkpoint that `load_param_into_net` has put into the optimizer. If the directory has later
    checkpoints of this prefix, the prefix becomes `<prefix>_1`, as in MindSpore. Old checkpoints are deleted after a
    newer one is committed.

    A save that fails is logged, and training continues; if the last save of a training failed, its end raises
    `SaveFailedError`. A network that can't be saved at all raises `StateError` at the first save.
    """

    def __init__(
        self,
        prefix: str | Callable[[Any], str] = "CKP",
        directory: str | Callable[[Any], str] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        config = CheckpointConfig() if config is None else config
        if not isinstance(config, train.CheckpointConfig):
            raise TypeError(f"ModelCheckpoint: config is {type(config).__name__}, not a CheckpointConfig")
        refuse_encryption("ModelCheckpoint", config.enc_key)
        if not callable(prefix):
            _check_prefix(prefix)
        self._prefix, self._directory, self._config = prefix, directory, config
        self._given: dict[str, Any] = config.append_dict or {}  # the script may change it during the training
        self._chosen: str | None = None  # the prefix of this training
        self._before = (0, 0)
        self._parameters: Any = None
        self._last_step, self._last_time = 0, time.monotonic()
        self._pending: SaveHandle | None = None
        self._failure: Exception | None = None
        self._latest = ""

    @property
    def latest_ckpt_file_name(self) -> str:
        """The path of the last checkpoint whose saving was started, an empty string before the first."""
        return self._latest

    def on_train_begin(self, run_context: Any) -> None:
        """Find out at which epoch and step the training continues."""
        self._parameters = parameters = run_context.original_args()
        self._before = progress_of(parameters.train_network)
        self._last_step, self._chosen = 0, None

    def on_train_step_end(self, run_context: Any) -> None:
        """Save if a save is due."""
        parameters = run_context.original_args()
        if self._due(parameters.cur_step_num):
            self._save(parameters)

    def on_train_end(self, run_context: Any) -> None:
        """Save the last step and wait until it is durable, unless the configuration never saves."""
        parameters = run_context.original_args()
        ever = self._config.save_checkpoint_steps or self._config.save_checkpoint_seconds
        if ever and parameters.cur_step_num != self._last_step:
            self._save(parameters)
        self._wait()
        settle()
        if self._failure is not None:
            raise SaveFailedError(f"{self._latest} was not saved: {self._failure}") from self._failure

    def __exit__(self, *error: Any) -> None:
        """Save where training ends in an exception and the configuration says so."""
        parameters, failed = self._parameters, bool(error) and error[0] is not None
        if failed and self._config.exception_save and parameters is not None and parameters.cur_step_num:
            try:
                self._save(parameters, "_breakpoint")
            except Exception as problem:
                _log.error("%s was NOT saved after the training had failed: %s", self._latest, problem)
        self._wait()

    def _due(self, step: int) -> bool:
        steps, seconds = self._config.save_checkpoint_steps, self._config.save_checkpoint_seconds
        if steps:
            return bool(step >= self._last_step + steps)
        return bool(seconds) and time.monotonic() - self._last_time > seconds

    def _save(self, parameters: Any, mark: str = "") -> None:
        self._last_step, self._last_time = parameters.cur_step_num, time.monotonic()
        epoch = self._before[0] + parameters.cur_epoch_num
        step = self._before[1] + parameters.cur_step_num
        step_in_epoch = (parameters.cur_step_num - 1) % parameters.batch_num + 1
        directory = os.path.realpath(local_path(_evaluated(self._directory, parameters) or os.getcwd(), "directory"))
        os.makedirs(directory, exist_ok=True)
        suffix = self._config.format
        kept: Checkpoints | None = None
        if callable(self._prefix):
            name = f"{_check_prefix(self._prefix(parameters))}{mark}.{suffix}"
        else:
            prefix = self._choose(directory, suffix, epoch, step_in_epoch)
            name = numbered_name(prefix, epoch, step_in_epoch, suffix)
            if mark:
                name = name.removesuffix(f".{suffix}") + f"{mark}.{suffix}"
            kept = Checkpoints(directory, prefix, suffix)
        network = parameters.train_network if self._config.saved_network is None else self._config.saved_network
        appended = {**self._given, **self._counted(epoch, step, parameters)}
        check_appended("ModelCheckpoint", appended)
        self._latest = os.path.join(directory, name)
        self._wait()
        if self._config.integrated_save:
            refuse_split("ModelCheckpoint", network, SLICES)
        try:
            self._pending = start_save(
                self._latest,
                state_of(network, appended, None),
                {"epoch_num": epoch, "step_num": step},
                None if kept is None else lambda: self._retain(kept),
            )
            self._failure = None
        except StateError:
            raise  # it won't get better
        except CheckpointError as error:
            self._failed(self._latest, error)

    def _counted(self, epoch: int, step: int, parameters: Any) -> dict[str, int]:
        """Return the numbers of `append_info`; where the script gives a number to count from, it counts from that."""
        counted = {}
        for name, ours, theirs in (
            ("epoch_num", epoch, parameters.cur_epoch_num),
            ("step_num", step, parameters.cur_step_num),
        ):
            if name in self._given:
                counted[name] = self._given[name] + theirs if self._given[name] else ours
        return counted

    def _choose(self, directory: str, suffix: str, epoch: int, step: int) -> str:
        """Return the prefix of this training: its own, or one with a number where that one's checkpoints come after."""
        if self._chosen is None:
            prefix, number = str(self._prefix), 0
            candidate = prefix
            while (found := Checkpoints(directory, candidate, suffix).all()) and (
                (found[-1].epoch, found[-1].step) >= (epoch, step)
            ):
                number += 1
                candidate = f"{prefix}_{number}"
            if number:
                _log.warning(
                    "%s holds checkpoints of %r that come after epoch %d, step %d, where this training goes on: its "
                    "own are called %r",
                    directory,
                    prefix,
                    epoch,
                    step,
                    candidate,
                )
            self._chosen = candidate
        return self._chosen

    def _retain(self, kept: Checkpoints) -> list[str]:
        if self._config.keep_checkpoint_max:
            return kept.keep_newest(self._config.keep_checkpoint_max)
        return kept.keep_one_per(self._config.keep_checkpoint_per_n_minutes)

    def _wait(self) -> None:
        """Wait for the save in flight, and note how it ended."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.durable.result(DEFAULT_TIMEOUT)
            except Exception as error:
                self._failed(pending.path, error)

    def _failed(self, path: str, error: Exception) -> None:
        self._failure = error
        _log.error("%s was NOT saved; training continues: %s", path, error)


def _check_prefix(prefix: Any) -> str:
    if not isinstance(prefix, str) or "/" in prefix or not prefix:
        raise ValueError(f"ModelCheckpoint: prefix={prefix!r}: a string without '/', or a function that returns one")
    return prefix


def _evaluated(given: Any, parameters: Any) -> Any:
    return given(parameters) if callable(given) else given
