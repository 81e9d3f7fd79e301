"""What of a Lightning trainer is state: parts that are read when a save asks, and given back after a restore."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ckptengine.errors import StateError
from ckptengine.state.per_rank import PerRank

__all__ = ["Averages", "Metrics", "OwnPart", "Part", "Results", "hooked", "overrides"]


_log = logging.getLogger("ckptengine")


class Part:
    """Values that `read` returns at a save; those that a restore brings wait in `loaded` until `apply` takes them."""

    def __init__(self, read: Callable[[], dict[str, Any]], give: Callable[[dict[str, Any]], object]) -> None:
        self._read, self._give = read, give
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the values: those just restored, until they are applied."""
        return self._read() if self.loaded is None else self.loaded

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what was restored for `apply`."""
        self.loaded = dict(state)

    def apply(self) -> None:
        """Give what was restored to where it belongs."""
        loaded, self.loaded = self.loaded, None
        if loaded is not None:
            self._give(loaded)


class OwnPart(Part):
    """The same for values that each rank has of its own; on another number of ranks each gets those of rank 0.

    `anew` makes of those what a rank begins with on another number of ranks.
    """

    def __init__(
        self,
        read: Callable[[], dict[str, Any]],
        give: Callable[[dict[str, Any]], object],
        anew: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(read, give)
        self._anew = anew

    def state_dict(self) -> dict[str, Any]:
        """Return the values, marked as this rank's own."""
        return {"own": PerRank(super().state_dict(), resize=self._resize)}

    def _resize(self, saved: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        return saved[0] if self._anew is None else self._anew(saved[0])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what was restored for `apply`."""
        self.loaded = dict(state["own"])


def overrides(hook: str, thing: Any, base: str) -> bool:
    """Whether an object's class has a hook of its own, not that of Lightning's class `base` or of its bases."""
    owner = next((kind for kind in type(thing).__mro__ if hook in vars(kind)), None)
    return owner is not None and owner.__name__ not in (base, "Callback", "CheckpointHooks")


def hooked(checkpoint: dict[str, Any], hook: Callable[[dict[str, Any]], object], who: str) -> dict[str, Any]:
    """Call a hook `on_save_checkpoint` with Lightning's dict; return the keys that it has added.

    What it takes out is saved all the same: weights, optimizers and the rest are saved as they are. What it puts in
    the place of a standard entry would be lost: that is a `StateError`.
    """
    before = dict(checkpoint)
    weights = dict(checkpoint["state_dict"])
    hook(checkpoint)
    for key, value in before.items():
        if key in checkpoint and checkpoint[key] is not value and key != "state_dict":
            raise StateError(f"{who}.on_save_checkpoint replaces {key!r}, which is saved as the trainer has it")
    changed = [name for name, value in checkpoint.get("state_dict", {}).items() if weights.get(name) is not value]
    if changed:
        raise StateError(
            f"{who}.on_save_checkpoint puts other values into 'state_dict' ({', '.join(changed[:3])}): the module is "
            "saved as it is. Put them under a key of their own, or keep them in the module or in `Resume(state=…)`"
        )
    return {key: value for key, value in checkpoint.items() if key not in before}


class Averages:
    """The averaged models of callbacks of Lightning's `WeightAveraging` kind, which keep them outside the module."""

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self.callbacks = [one for one in callbacks if isinstance(getattr(one, "_average_model", None), torch.nn.Module)]

    def modules(self) -> list[torch.nn.Module]:
        """Return the averaged models, in the callbacks' order."""
        return [one._average_model for one in self.callbacks]


class Results:
    """The means, sums and extremes of an epoch that `self.log` has gathered so far, and the metrics seen last."""

    def __init__(self, trainer: Any, metrics: Metrics) -> None:
        self._trainer, self._metrics = trainer, metrics
        self._pending: dict[str, dict[str, Any]] = {}

    def read(self) -> dict[str, Any]:
        """Return what is logged for the epoch's end, and the metrics that callbacks and schedulers watch."""
        gathered = {}
        for key, metric in self._trainer.fit_loop.epoch_loop._results.items():
            if metric.is_tensor and metric.meta.on_epoch:
                gathered[key] = {
                    "value": metric.value.detach(),
                    "updates": metric._update_count,
                    "reset": metric.has_reset,
                }
                if metric.meta.is_mean_reduction:
                    gathered[key]["count"] = torch.as_tensor(metric.cumulated_batch_size).detach()
        seen = self._trainer._logger_connector._callback_metrics
        metrics = {key: value.detach() for key, value in seen.items() if isinstance(value, torch.Tensor)}
        return {"epoch": gathered, "seen": metrics, "torchmetrics": self._metrics.read()}

    def give(self, saved: dict[str, Any]) -> None:
        """Go on with what was gathered: each value is put back when its name is logged for the first time."""
        connector = self._trainer._logger_connector
        connector._callback_metrics.update(saved["seen"])
        self._metrics.give(saved["torchmetrics"])
        results = self._trainer.fit_loop.epoch_loop._results
        self._pending = {key: one for key, one in saved["epoch"].items() if not one["reset"]}
        if not self._pending:
            return
        update = results.update_metrics

        def resumed(key: str, value: Any, batch_size: int) -> None:
            one = self._pending.pop(key, None)
            if one is not None:
                _fill(results[key], one)
            if not self._pending:
                vars(results).pop("update_metrics", None)
            update(key, value, batch_size)

        results.update_metrics = resumed

    @staticmethod
    def anew(saved: dict[str, Any]) -> dict[str, Any]:
        """Return what is known on another number of ranks: what was gathered by each of the old ones is not."""
        if any(not one["reset"] for one in saved["epoch"].values()):
            _log.warning("the epoch continues on another number of ranks: its logged means start over")
        return {"epoch": {}, "seen": saved["seen"], "torchmetrics": []}

    def left(self) -> list[str]:
        """Return the names that were logged before the restart and not since, and forget them: an epoch ends."""
        names = sorted(self._pending)
        self._pending = {}
        vars(self._trainer.fit_loop.epoch_loop._results).pop("update_metrics", None)
        return names


def _fill(metric: Any, saved: Mapping[str, Any]) -> None:
    metric.value = saved["value"].to(metric.value.device)
    if "count" in saved:
        metric.cumulated_batch_size = saved["count"].to(metric.value.device)
    metric._update_count = saved["updates"]


class Metrics:
    """The metrics of torchmetrics in some modules: each rank has values of its own, of its own batches."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        kind = getattr(sys.modules.get("torchmetrics"), "Metric", None)
        named = (one for module in modules for one in module.named_modules()) if kind is not None else ()
        self._metrics = [(name, one) for name, one in named if isinstance(one, kind or ())]
        self._aside: list[dict[str, Any]] | None = None  # what is hidden of each metric, within `aside`

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Have the modules' `state_dict` leave the metrics out within this block."""
        self._aside = [self._own(one) for _, one in self._metrics]
        try:
            for (_, one), own in zip(self._metrics, self._aside, strict=True):
                vars(one).update(_defaults={}, _persistent={})
                for name in own.keys() & set(_COUNTS):
                    del vars(one)[name]
            yield
        finally:
            for (_, one), own in zip(self._metrics, self._aside, strict=True):
                vars(one).update(own)
            self._aside = None

    @staticmethod
    def _own(metric: Any) -> dict[str, Any]:
        return {name: vars(metric)[name] for name in ("_defaults", "_persistent", *_COUNTS) if name in vars(metric)}

    def read(self) -> list[dict[str, Any]]:
        """Return the values and counts of each metric, in order."""
        owns = self._aside or [self._own(one) for _, one in self._metrics]
        return [
            {
                "name": name,
                "values": {key: getattr(one, key) for key in own["_defaults"]},
                "counts": {key: own[key] for key in _COUNTS if key in own},
            }
            for (name, one), own in zip(self._metrics, owns, strict=True)
        ]

    def give(self, saved: list[dict[str, Any]]) -> None:
        """Set values and counts."""
        for (name, one), state in zip(self._metrics, saved, strict=False):
            if name == state["name"]:
                for key, value in state["values"].items():
                    setattr(one, key, _on(one.device, value))
                vars(one).update(state["counts"])
                one._computed = None


_COUNTS = ("_update_count", "_num_vals_seen")


def _on(device: Any, value: Any) -> Any:
    return [one.to(device) for one in value] if isinstance(value, list) else value.to(device)
