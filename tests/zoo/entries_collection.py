"""The optimizers and schedulers of `pytorch_optimizer`, found in the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytorch_optimizer as collection
import torch
from entries_torch import SCHEDULERS, classes, schedule
from entry import Entry, Job, World, loss_of, matrices, mixed, train
from torch import nn

__all__ = ["entries"]

PACKAGE = "pytorch_optimizer"

OPTIONS: dict[str, dict[str, Any]] = {
    # What happens every so many steps happens before the save and after it, or is under way at the save.
    "AdaHessian": {"update_period": 2},
    "Alice": {"update_interval": 2, "rank": 4, "leading_basis": 2},
    "AliG": {"max_lr": 0.1, "momentum": 0.9},
    "AdaShift": {"keep_num": 2},
    "BSAM": {"num_data": 100},
    "Conda": {"update_proj_gap": 2},
    "DASH": {"block_size": 8, "precondition_frequency": 2},
    "DualAdam": {"switch_rate": 0.5},
    "EmoFact": {"use_shadow": True},
    "EmoLynx": {"use_shadow": True},
    "EmoNavi": {"use_shadow": True},
    "LookSAM": {"k": 2},
    "Lookahead": {"k": 2},
    "MADGRAD": {"momentum": 0.9},
    "Ranger": {"k": 2},
    "Ranger21": {"num_iterations": 8, "lookahead_merge_time": 2},
    "SaRA": {"threshold": 0.1},
    "ScalableShampoo": {"start_preconditioning_step": 2, "preconditioning_compute_steps": 2, "block_size": 8},
    "Shampoo": {"preconditioning_compute_steps": 2},
    "SOAP": {"precondition_frequency": 2},
    "SophiaH": {"update_period": 2},
    "SPAM": {"density": 0.5, "warmup_epoch": 2, "update_proj_gap": 2, "grad_accu_steps": 2, "threshold": 100},
    "SPlus": {"inverse_steps": 2},
    "SRMM": {"memory_length": 2},
    "StableSPAM": {"t_max": 4, "update_proj_gap": 2},
}

MATRICES = frozenset({"Fira", "GaLore", "LoRARite", "RACS", "Alice", "SpectralSphere", "Conda", "LBFGS", "DeMo"})
"""Those that treat matrices alone, or differently; the others train a model with all kinds of parameters."""

EVEN = frozenset({"DAdaptAdam", "DAdaptLion", "FlashAdamW"})
"""Those that flatten sharded parameters, which torch allows only where the ranks' parts are equally long."""

LOW_RANK = frozenset({"APOLLO", "Fira", "GaLore"})
HOW = {"AdaHessian": "graph", "SophiaH": "graph", "AliG": "value", "BSAM": "again", "LBFGS": "closure"}
OF_MODEL = frozenset({"AdamMini"})
SHARPNESS = frozenset({"SAM", "LookSAM", "FriendlySAM", "WSAM"})
AROUND = frozenset({"Lookahead", "OrthoGrad", "TRAC", "ScheduleFreeWrapper", "Magma"})
GROUPED = frozenset({"AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon"})
WHOLE = frozenset({"DeMo", "DistributedMuon"})
"""Those that exchange whole gradients or parameters between ranks themselves: under DDP or bare, not under FSDP2."""

Make = Callable[[World, type, dict[str, Any]], Job]


def entries() -> Iterator[Entry]:
    for name, kind in classes(collection, torch.optim.Optimizer):
        said = f"{name} (whole parameters on each rank)" if name in WHOLE else name
        yield Entry(PACKAGE, said, _starter(_maker(name), kind, OPTIONS.get(name, {})))
    for name, kind in classes(collection, torch.optim.lr_scheduler.LRScheduler):
        yield Entry(PACKAGE, name, schedule(SCHEDULERS.get(name, _SCHEDULERS.get(name, kind)), False))
    yield Entry(PACKAGE, "ProportionScheduler", _proportion)


def _starter(make: Make, kind: type, options: dict[str, Any]) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        # What works on many tensors in one call has no rules for DTensors in this version of torch.
        if kind.__name__ in WHOLE:
            world = replace(world, sharded=False)
        one_by_one = world.size > 1 and "foreach" in inspect.signature(kind.__init__).parameters
        return make(world, kind, {"foreach": False, **options} if one_by_one else options)

    return start


def _maker(name: str) -> Make:
    special = {"GSAM": _gsam, "LOMO": _lomo, "AdaLOMO": _lomo, "PCGrad": _pcgrad, "SafeFP16Optimizer": _fp16}
    for names, make in ((SHARPNESS, _sharpness), (AROUND, _around), (GROUPED, _grouped), (OF_MODEL, _of_model)):
        special.update(dict.fromkeys(names, make))
    return special.get(name, _plain)


def _plain(world: World, kind: type, options: dict[str, Any]) -> Job:
    name = kind.__name__
    if name in EVEN and world.size > 1:
        model = mixed(world, outputs=4)
    else:
        model = (matrices if name in MATRICES | LOW_RANK else mixed)(world)
    parameters: Any = model.parameters()
    if name in LOW_RANK:
        parameters = [{"params": list(model.parameters()), "rank": 2, "update_proj_gap": 2, "scale": 1.0}]
        parameters[0]["projection_type"] = "random" if name == "APOLLO" else "std"
    optimizer = kind(parameters, **options)
    _begin(optimizer)
    return train(world, model, optimizer, how=HOW.get(name, "plain"))


def _begin(optimizer: Any) -> None:
    """Optimizers that keep two sets of weights have a mode, as modules have."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()


def _of_model(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = mixed(world)
    return train(world, model, kind(model, lr=0.01, **options))


def _grouped(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = (matrices if kind.__name__ in WHOLE else mixed)(world)
    of_two = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [{"params": of_two, "use_muon": True}, {"params": others, "use_muon": False}]
    return train(world, model, kind(groups, **options))


def _sharpness(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = mixed(world)
    inner = {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9, **options}
    optimizer = (
        kind(model, model.parameters(), **inner) if kind.__name__ == "WSAM" else kind(model.parameters(), **inner)
    )
    return train(world, model, optimizer, how="again")


def _around(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = mixed(world)
    optimizer = kind(_adamw(model, world), **options)
    _begin(optimizer)
    return train(world, model, optimizer)


def _adamw(model: nn.Module, world: World) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=world.size == 1)


def _gsam(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = mixed(world)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)
    rho = collection.ProportionScheduler(schedule, max_lr=0.05, min_lr=0.0, max_value=2.0, min_value=1.0)
    optimizer = kind(model.parameters(), base_optimizer=inner, model=model, rho_scheduler=rho, **options)

    def step(number: int) -> float:
        x = world.batch(number, 1, 4, 4)
        optimizer.set_closure(nn.functional.mse_loss, x, torch.full((len(x), 3), 0.5))
        _, loss = optimizer.step()
        schedule.step()
        optimizer.update_rho_t()
        return float(loss)

    return Job({"model": model, "optimizer": optimizer, "scheduler": schedule, "rho": rho}, step)


def _lomo(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = (matrices if kind.__name__ == "AdaLOMO" else mixed)(world)
    optimizer = kind(model, **options)

    def step(number: int) -> float:
        loss = loss_of(world, model, number)
        optimizer.fused_backward(loss, 0.01)
        return float(loss.detach())

    return Job({"model": model, "optimizer": optimizer}, step)


def _pcgrad(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = mixed(world, outputs=4)
    optimizer = kind(_adamw(model, world), **options)

    def step(number: int) -> float:
        optimizer.zero_grad()
        losses = [loss_of(world, model, number), loss_of(world, model, number + 100)]
        optimizer.pc_backward(losses)
        optimizer.step()
        return float(losses[0].detach())

    return Job({"model": model, "optimizer": optimizer}, step)


def _fp16(world: World, kind: type, options: dict[str, Any]) -> Job:
    model = mixed(world).half()
    optimizer = kind(_adamw(model, world), **options)

    def step(number: int) -> float:
        optimizer.zero_grad()
        loss = (model(world.batch(number, 1, 4, 4).half()) - 0.5).square().mean()
        optimizer.backward(loss)
        optimizer.step()
        return float(loss.detach())

    return Job({"model": model, "optimizer": optimizer}, step)


_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "CosineAnnealingWarmupRestarts": lambda o: collection.CosineAnnealingWarmupRestarts(
        o, first_cycle_steps=4, warmup_steps=2, max_lr=0.1, min_lr=0.01
    ),
    "REXScheduler": lambda o: collection.REXScheduler(o, total_steps=10),
}


def _proportion(world: World) -> Job:
    model = mixed(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    rho = collection.ProportionScheduler(schedule, max_lr=0.1, min_lr=0.0, max_value=2.0, min_value=1.0)
    after = [lambda _, __: schedule.step(), lambda _, __: rho.step()]
    return train(world, model, optimizer, more={"scheduler": schedule, "rho": rho}, after=after)
