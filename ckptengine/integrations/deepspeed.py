"""DeepSpeed: an engine with ZeRO 1, 2 or 3 as a state, which loads at any number of ranks, and without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from ckptengine.errors import LoadMismatchError
from ckptengine.state.refusal import Refusal

__all__ = ["Progress", "state"]


def state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Return the state of a DeepSpeed engine: `model`, `optimizer`, `scheduler` if it has one, and `progress`.

    `engine` uses ZeRO stage 1, 2 or 3. The weights are the fp32 master weights, under the names of the module in the
    engine, so that a state with that module and a plain optimizer can load them, too (`only=["model", "optimizer"]`).
    Add the job's other objects to the dict. A save raises `StateError` for engines that are not supported
    (docs/parallelism.md).
    """
    found: dict[str, Any] = {"model": engine, "optimizer": engine.optimizer}
    if engine.lr_scheduler is not None:
        found["scheduler"] = engine.lr_scheduler
    return {**found, "progress": Progress(engine)}


class Progress:
    """What an engine counts, and its loss scale, as an object with `state_dict` and `load_state_dict`."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of steps and samples, and all fields of the loss scaler."""
        engine = self._engine
        if engine.micro_steps % engine.gradient_accumulation_steps():
            return {"progress": Refusal("in the middle of accumulating gradients; save after a step of the optimizer")}
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        fields: dict[str, Any] = getattr(scaler, "__dict__", {})
        odd = [name for name, value in fields.items() if not _is_plain(value)]
        if odd:
            return {
                "loss_scaler": Refusal(
                    f"{type(scaler).__name__} keeps {', '.join(odd)}, which is no plain value; leave `progress` out of "
                    "the state, and save the loss scaler as your code knows it"
                )
            }
        return {
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
            "loss_scaler": dict(fields),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; micro-batches are counted in this job's own size.

        Raises `LoadMismatchError` for a loss scaler of another kind (a dynamic one for fp16, a static one for bf16).
        """
        engine = self._engine
        scaler, saved = getattr(engine.optimizer, "loss_scaler", None), state["loss_scaler"]
        here = getattr(scaler, "__dict__", {})
        if here.keys() != saved.keys() or here.get("dynamic") != saved.get("dynamic"):
            raise LoadMismatchError(
                f"the loss scaler of the checkpoint is another one ({_told(saved)}) than that of this engine "
                f"({_told(here)}); restore with `only=` without `progress`, and the engine counts and scales from its "
                "own beginning"
            )
        for name, value in saved.items():
            setattr(scaler, name, value)
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, state[name])
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.dtype)


def _told(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "none"
