"""What is put around models, optimizers and losses, and layers whose state is not only their weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from entry import Entry, Job, World, loss_of, mixed, train
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import swa_utils

__all__ = ["layers", "wrappers"]

WRAPPERS = "wrappers of torch"
LAYERS = "layers of torch"


def wrappers() -> Iterator[Entry]:
    yield Entry(WRAPPERS, "AveragedModel (SWA)", _averaged())
    yield Entry(WRAPPERS, "AveragedModel (EMA)", _averaged(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)))
    yield Entry(
        WRAPPERS,
        "AveragedModel (EMA, buffers too)",
        _averaged(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    yield Entry(WRAPPERS, "GradScaler", _scaled)
    yield Entry(WRAPPERS, "PostLocalSGDOptimizer (DDP)", _post_local)
    yield Entry(WRAPPERS, "ZeroRedundancyOptimizer (DDP)", _zero)
    yield Entry(WRAPPERS, "DistributedDataParallel", _ddp)
    yield Entry(WRAPPERS, "torch.compile", _compiled)
    yield Entry(WRAPPERS, "checkpoint_wrapper (activation checkpointing)", _recomputed)
    yield Entry(
        WRAPPERS,
        "optimizers applied in backward",
        _in_backward,
        alone="under FSDP2 they change nothing, with or without a checkpoint",
    )
    yield Entry(WRAPPERS, "two optimizers, two groups each", _two_optimizers)
    yield Entry(WRAPPERS, "early stopping that keeps the best weights", _early_stopping)


def _averaged(**options: Any) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        model = mixed(replace(world, sharded=False))
        averaged = swa_utils.AveragedModel(model, **options)
        world.shard(averaged.module)
        world.shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        after = [lambda _, __: averaged.update_parameters(model)]
        return train(world, model, optimizer, more={"averaged": averaged}, after=after)

    return start


def _scaled(world: World) -> Job:
    model = mixed(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def step(number: int) -> float:
        optimizer.zero_grad()
        loss = loss_of(world, model, number) * (float("inf") if number == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return 0.0 if number == 1 else float(loss.detach())

    return Job({"model": model, "optimizer": optimizer, "scaler": scaler}, step)


def _plain_model(world: World) -> nn.Module:
    return mixed(replace(world, sharded=False))


def _ddp_model(world: World) -> nn.Module:
    return nn.parallel.DistributedDataParallel(_plain_model(world))


def _ddp(world: World) -> Job:
    model = _ddp_model(world)
    return train(world, model, torch.optim.AdamW(model.parameters(), lr=0.01))


def _post_local(world: World) -> Job:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = _ddp_model(world)
    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return train(world, model, PostLocalSGDOptimizer(inner, averager))


def _zero(world: World) -> Job:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = _ddp_model(world)
    return train(world, model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01))


def _compiled(world: World) -> Job:
    model: Any = torch.compile(mixed(world), backend="eager")
    return train(world, model, torch.optim.AdamW(model.parameters(), lr=0.01))


def _recomputed(world: World) -> Job:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(world.seed)
    block = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.3), nn.Tanh())
    model = world.shard(nn.Sequential(nn.Flatten(), checkpoint_wrapper(block), nn.Linear(8, 3)))
    return train(world, model, torch.optim.AdamW(model.parameters(), lr=0.01))


def _in_backward(world: World) -> Job:
    from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

    model = mixed(world)
    _apply_optimizer_in_backward(torch.optim.AdamW, model.parameters(), {"lr": 0.01})

    def step(number: int) -> float:
        loss = loss_of(world, model, number)
        loss.backward()
        return float(loss.detach())

    return Job({"model": model, "optimizers": _get_in_backward_optimizers(model)}, step)


def _two_optimizers(world: World) -> Job:
    model = mixed(world)
    matrix = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vector = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    first = torch.optim.SGD([{"params": matrix[:1], "lr": 0.1}, {"params": matrix[1:]}], lr=0.01, momentum=0.9)
    second = torch.optim.AdamW([{"params": vector[:2]}, {"params": vector[2:], "weight_decay": 0.0}], lr=0.01)

    def step(number: int) -> float:
        loss = loss_of(world, model, number)
        loss.backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return Job({"model": model, "optimizers": [first, second]}, step)


class EarlyStopping:
    """What many people write: the best loss, and the weights that had it."""

    def __init__(self) -> None:
        self.best, self.weights, self.bad = float("inf"), None, 0

    def look(self, loss: float, model: nn.Module) -> None:
        self.bad += 1
        if loss < self.best:
            self.best, self.bad, self.weights = loss, 0, copy.deepcopy(model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _early_stopping(world: World) -> Job:
    model = mixed(world)
    stopping = EarlyStopping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    after = [lambda number, _: stopping.look(1.0 / (1 + number % 4), model)]
    return train(world, model, optimizer, more={"stopping": stopping}, after=after)


def layers() -> Iterator[Entry]:
    norm, spectral, orthogonal = (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    )
    yield Entry(LAYERS, "parametrizations.weight_norm", _with_linear(norm))
    yield Entry(LAYERS, "parametrizations.spectral_norm", _with_linear(spectral))
    yield Entry(LAYERS, "parametrizations.orthogonal", _with_linear(orthogonal))
    yield Entry(LAYERS, "utils.weight_norm", _with_linear(nn.utils.weight_norm))
    yield Entry(LAYERS, "utils.spectral_norm", _with_linear(nn.utils.spectral_norm))
    yield Entry(LAYERS, "utils.prune.l1_unstructured", _with_linear(_pruned))
    yield Entry(
        LAYERS,
        "BatchNorm1d",
        _of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))),
        own_buffers=True,
    )
    yield Entry(
        LAYERS,
        "BatchNorm1d(momentum=None)",
        _of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3))),
        own_buffers=True,
    )
    yield Entry(
        LAYERS, "Dropout", _of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    )
    yield Entry(LAYERS, "LSTM", _of(lambda: _Recurrent()))
    yield Entry(LAYERS, "TransformerEncoderLayer", _of(lambda: _Attention()))
    yield Entry(LAYERS, "tied weights", _of(lambda: _Tied()))
    yield Entry(LAYERS, "frozen parameters", _of(_frozen))
    yield Entry(LAYERS, "a buffer that is a view of another", _of(lambda: _Views()), own_buffers=True)
    yield Entry(LAYERS, "extra state (get_extra_state)", _of(lambda: _Extra()))
    yield Entry(LAYERS, "quantization-aware training (observers)", _quantization_aware, own_buffers=True)
    yield Entry(LAYERS, "quantized dynamically, with a trained head", _quantized)


def _of(build: Callable[[], nn.Module]) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        torch.manual_seed(world.seed)
        model = world.shard(build())
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return train(world, model, torch.optim.AdamW(wanted, lr=0.01))

    return start


def _with_linear(change: Callable[[nn.Module], nn.Module]) -> Callable[[World], Job]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(nn.Flatten(), change(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 3))

    return _of(build)


def _pruned(layer: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-any-return]


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    return model


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x[:, 0])[0][:, -1])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, 0])


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x.flatten(1)).tanh())


class _Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("first", self.mean[:4])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x.flatten(1))
        self.mean.lerp_(y.detach().mean(0), 0.1)
        return y - self.first.sum()


class _Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(16, 8), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x.flatten(1)) / self.calls

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "seen": torch.tensor([self.calls])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def _quantization_aware(world: World) -> Job:
    from torch.ao import quantization

    torch.manual_seed(world.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(quantization.QuantStub(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        model = world.shard(quantization.prepare_qat(model.train()))
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def _quantized(world: World) -> Job:
    from torch.ao import quantization

    torch.manual_seed(world.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), {nn.Linear})
    head = world.shard(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))
    model = nn.Sequential(body, head)
    return train(world, model, torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9))
