"""The optimizers of schedulefree, timm, torchao and bitsandbytes, found in the packages."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import schedulefree
import torch
import torchao.optim
from entries_torch import classes
from entry import Entry, Job, World, mixed, train, wide
from torch.optim import Optimizer

__all__ = ["entries"]


def entries() -> Iterator[Entry]:
    yield from _schedulefree()
    yield from _timm()
    for name, kind in classes(torchao.optim, Optimizer):
        yield Entry("torchao.optim", name, _low_bit(kind))
    for name, kind in classes(bitsandbytes.optim, Optimizer):
        yield Entry("bitsandbytes.optim", name, _low_bit(kind))


def _schedulefree() -> Iterator[Entry]:
    for name in sorted(dir(schedulefree)):
        kind = getattr(schedulefree, name)
        if inspect.isclass(kind):
            yield Entry("schedulefree", name, _free(kind, name))


def _free(kind: Callable[..., Any], name: str) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        model = mixed(world)
        options = {"foreach": world.size == 1} if "foreach" in inspect.signature(kind).parameters else {}
        if "Wrapper" in name:
            optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.05, foreach=world.size == 1))
        else:
            optimizer = kind(model.parameters(), lr=0.05, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return train(world, model, optimizer, how="closure" if name.endswith("Closure") else "plain")

    return start


def timm_without_models() -> tuple[types.ModuleType, types.ModuleType]:
    """Return `timm.optim` and `timm.scheduler`; the rest of timm needs torchvision, which these don't."""
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        timm = types.ModuleType("timm")
        timm.__path__ = list(spec.submodule_search_locations or ())
        models = types.ModuleType("timm.models")
        models.group_parameters = None  # type: ignore[attr-defined]
        sys.modules.update({"timm": timm, "timm.models": models})
    return importlib.import_module("timm.optim"), importlib.import_module("timm.scheduler")


TIMM: dict[str, dict[str, Any]] = {
    "Adan": {"lr": 0.01},
    "Lookahead": {"alpha": 0.5, "k": 2},
    "Lars": {"lr": 0.1, "momentum": 0.9},
    "SGDP": {"lr": 0.01, "momentum": 0.9},
    "SGDW": {"lr": 0.01, "momentum": 0.9},
    "Muon": {"lr": 0.01},
}


def _timm() -> Iterator[Entry]:
    optimizers, schedulers = timm_without_models()
    for name, kind in classes(optimizers, Optimizer):
        yield Entry("timm.optim", name, _of_timm(kind, name))
        if name == "Adahessian":
            for every in (1, 2):
                said = f"{name}(update_each={every}), its generator in ce.RNG"
                yield Entry("timm.optim", said, _of_timm(kind, name, update_each=every))
    for name, kind in classes(schedulers, schedulers.scheduler.Scheduler):
        yield Entry("timm.scheduler", name, _scheduled(kind, name))


def _of_timm(kind: Callable[..., Any], name: str, update_each: int = 0) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        model = mixed(world)
        options = {"lr": 0.01, **TIMM.get(name, {})}
        if update_each:
            options["update_each"] = update_each
        if world.size > 1 and "foreach" in inspect.signature(kind).parameters:
            options["foreach"] = False
        if name == "Lookahead":
            inner = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=world.size == 1)
            optimizer = kind(inner, **TIMM[name])
        else:
            optimizer = kind(model.parameters(), **options)
        job = train(world, model, optimizer, how="graph" if name == "Adahessian" else "plain")
        if update_each:
            job.generators["hessian"] = optimizer.generator
        return job

    return start


SCHEDULERS: dict[str, dict[str, Any]] = {
    "CosineLRScheduler": {"t_initial": 4, "cycle_limit": 2, "warmup_t": 2, "noise_range_t": (1, 6)},
    "MultiStepLRScheduler": {"decay_t": [2, 4]},
    "PlateauLRScheduler": {"patience_t": 0, "threshold": 0.5},
    "PolyLRScheduler": {"t_initial": 5, "warmup_t": 2},
    "StepLRScheduler": {"decay_t": 2},
    "TanhLRScheduler": {"t_initial": 5},
    "WSDLRScheduler": {"t_initial": 6, "warmup_t": 2, "decay_t": 2},
}


def _scheduled(kind: Callable[..., Any], name: str) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        model = mixed(world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = kind(optimizer, **SCHEDULERS.get(name, {}))
        after = [lambda number, _: scheduler.step(number + 1, 1.0)]
        return train(world, model, optimizer, more={"scheduler": scheduler}, after=after)

    return start


def _low_bit(kind: Callable[..., Any]) -> Callable[[World], Job]:
    """Parameters of 4096 elements on each rank, from which these optimizers quantize their state."""

    def start(world: World) -> Job:
        model = wide(world)
        options: dict[str, Any] = {"lr": 0.01}
        if "optimizer_class" in inspect.signature(kind).parameters:
            options["optimizer_class"] = torch.optim.AdamW
        if "LARS" in kind.__name__ or kind.__name__.startswith("SGD"):
            options["momentum"] = 0.9
        return train(world, model, kind(model.parameters(), **options))

    return start
