"""DeepSpeed: an engine with ZeRO 1, 2 or 3 as a state, which loads at any number of ranks, and without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

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
        """Return the counts of steps and samples, and the state of the loss scaler."""
        engine = self._engine
        if engine.micro_steps % engine.gradient_accumulation_steps():
            return {"progress": Refusal("in the middle of accumulating gradients; save after a step of the optimizer")}
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        scale = {
            name: value
            for name, value in getattr(scaler, "__dict__", {}).items()
            if type(value) in (bool, int, float) or value is None
        }
        return {
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
            "loss_scaler": scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; micro-batches are counted in this job's own size."""
        engine = self._engine
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, state[name])
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        for name, value in state["loss_scaler"].items():
            if scaler is not None and hasattr(scaler, name):
                setattr(scaler, name, value)
