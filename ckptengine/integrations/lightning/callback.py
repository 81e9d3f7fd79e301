"""`Resume`, a callback for Lightning's Trainer: the same command, started again, goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ckptengine.errors import StateError
from ckptengine.integrations.lightning.session import Session

try:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.trainer import call
except ModuleNotFoundError:  # the same code under its older name
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import Checkpoint
    from pytorch_lightning.trainer import call

__all__ = ["Resume"]


class Resume(Checkpoint):  # type: ignore[misc]
    """Restore a training when `Trainer.fit` begins, and save it in the background when a save is due.

        trainer = Trainer(max_epochs=10, callbacks=[Resume("runs/gpt", every=100, keep_last=3)])
        trainer.fit(model, loader)

    - `run`, `keep_last`, `options`: as for `ckptengine.Checkpointer`.
    - `every`: a number of optimizer steps (`trainer.global_step`), a time, or `"auto"`; by default once per epoch.
    - `state`: your own objects, by name.
    - `after_validation`: also save after each validation; the default with `keep_best`. The metrics of a validation are
      stored with the checkpoint of the same step.

    Saved and restored are the module, optimizers, schedulers, loops, the position in the training data, the states and
    hooks of callbacks, module and datamodule, the scaler, the epoch's means so far, metrics, and the random streams. If
    the run has a checkpoint, the training continues from it; a `ckpt_path` is used only while it has none.

    Raises what `Checkpointer` raises, and `StateError` for strategies, loaders and hooks that could not be restored.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        every: int | str | Any | None = None,
        keep_last: int | Mapping[str, int] | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        after_validation: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._options = {"run": run, "every": every, "keep_last": keep_last, **options}
        self._extra = dict(state or {})
        self._each_epoch = every is None and options.get("policy") is None
        self._after_validation = options.get("keep_best") is not None if after_validation is None else after_validation
        self._session: Session | None = None
        self.start: int | None = None

    @property
    def state_key(self) -> str:
        """The name of this callback's state in Lightning."""
        return f"Resume({os.fspath(self._options['run'])})"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the newest valid checkpoint of the run, if it has one."""
        if not isinstance(trainer, Trainer):
            raise StateError(
                f"Resume is for {Trainer.__module__}, this trainer is {type(trainer).__module__}'s: import Lightning "
                "under one of its names"
            )
        if sum(isinstance(one, Resume) for one in trainer.callbacks) > 1:
            raise StateError(
                "the trainer has several Resume callbacks, and only one run can be resumed: give one, with local= or "
                "memory= for further places, or on_commit= for copies"
            )
        if trainer.fast_dev_run:
            return
        self._session = session = Session(
            trainer, pl_module, call, self._options, self._extra, self._each_epoch, self._after_validation
        )
        session.wrap()
        self.start = session.restore()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note that this step has been validated."""
        if self._session is not None and not trainer.sanity_checking:
            self._session.validated = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait until the last checkpoint is durable."""
        session, self._session = self._session, None
        if session is not None:
            session.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the run as it is: the next start continues from what is committed."""
        session, self._session = self._session, None
        if session is not None:
            session.fail(exception)
