"""torch's own optimizers and schedulers, found in its modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from entry import Entry, Job, World, matrices, mixed, train
from torch import nn
from torch.optim import lr_scheduler

__all__ = ["SCHEDULERS", "classes", "optimizers", "schedule", "schedulers"]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adafactor": {"lr": 0.01},
    "Adadelta": {"lr": 0.1},
    "ASGD": {"lr": 0.01, "t0": 2},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
}


def classes(module: ModuleType, base: type, *, but: tuple[str, ...] = ()) -> Iterator[tuple[str, type]]:
    """Yield the classes of a module that are a kind of `base`, by name, without abstract ones and other modules'."""
    for name in sorted(dir(module), key=str.lower):
        kind = getattr(module, name)
        if not inspect.isclass(kind) or not issubclass(kind, base) or kind is base or name.startswith("_"):
            continue
        if (
            not inspect.isabstract(kind)
            and name not in but
            and kind.__module__.startswith(module.__name__.split(".")[0])
        ):
            yield name, kind


def optimizers() -> Iterator[Entry]:
    for name, kind in classes(torch.optim, torch.optim.Optimizer):
        yield Entry("torch.optim", name, _starter(name, kind))
    for name, options in (("Adam", {"fused": True}), ("AdamW", {"foreach": False, "capturable": False})):
        said = ", ".join(f"{key}={value}" for key, value in options.items())
        yield Entry("torch.optim", f"{name}({said})", _starter(name, getattr(torch.optim, name), **options))
    yield Entry("torch.optim", "AdamW(lr=tensor)", _tensor_lr)


def _starter(name: str, kind: Callable[..., Any], **more: Any) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        options = {**OPTIMIZERS.get(name, {"lr": 0.01}), **more}
        if name == "SparseAdam":
            return _sparse(world, kind, options)
        model = (matrices if name in ("LBFGS", "Muon") else mixed)(world)
        return train(world, model, kind(model.parameters(), **options), how="closure" if name == "LBFGS" else "plain")

    return start


def _tensor_lr(world: World) -> Job:
    model = mixed(world)
    return train(world, model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01)))


def _sparse(world: World, kind: Callable[..., Any], options: dict[str, Any]) -> Job:
    torch.manual_seed(world.seed)
    model = world.shard(nn.Sequential(nn.Embedding(8, 4, sparse=True)))
    optimizer = kind(model.parameters(), **options)

    def step(number: int) -> float:
        optimizer.zero_grad()
        loss = model(world.batch(number, 3).mul(2).abs().long().clamp(max=7)).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Job({"model": model, "optimizer": optimizer}, step)


def _doubled(step: int) -> float:
    return 1.0 / (1 + step)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, _doubled),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, _doubled),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5, cooldown=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
}


def schedulers() -> Iterator[Entry]:
    for name, kind in classes(lr_scheduler, lr_scheduler.LRScheduler):
        make = SCHEDULERS.get(name, kind)
        yield Entry("torch.optim.lr_scheduler", name, schedule(make, name == "ReduceLROnPlateau"))
    yield Entry("torch.optim.swa_utils", "SWALR", schedule(lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 4), False))


def schedule(make: Callable[[Any], Any], by_loss: bool) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        model = mixed(world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = make(optimizer)
        scheduled = (lambda _, loss: scheduler.step(1.0)) if by_loss else (lambda _, __: scheduler.step())
        return train(world, model, optimizer, more={"scheduler": scheduler}, after=[scheduled])

    return start
