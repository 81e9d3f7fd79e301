"""Layers, adapters and metrics of other packages: torchao, bitsandbytes, peft, torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import peft
import torch
import torchao.float8
import torchao.quantization as low_bit
import torchmetrics
from entry import Entry, Job, World, mixed, train
from torch import nn
from torchao.quantization import qat

import ckptengine as ce

__all__ = ["entries"]


def entries() -> Iterator[Entry]:
    yield from _layers()
    yield from _adapters()
    yield from _metrics()


def _model(world: World, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


def _trained(world: World, model: nn.Module) -> Job:
    model = world.shard(model)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return train(world, model, torch.optim.AdamW(wanted, lr=0.01))


def _layers() -> Iterator[Entry]:
    configs: dict[str, Any] = {
        "Int8WeightOnlyConfig": low_bit.Int8WeightOnlyConfig,
        "Int8DynamicActivationInt8WeightConfig": low_bit.Int8DynamicActivationInt8WeightConfig,
        "IntxWeightOnlyConfig": low_bit.IntxWeightOnlyConfig,
        "Float8WeightOnlyConfig": low_bit.Float8WeightOnlyConfig,
    }
    for name, config in configs.items():
        yield Entry("torchao", f"{name}, with a trained head", _quantized(config))
    yield Entry("torchao", "QATConfig (fake quantization)", _fake_quantized)
    yield Entry("torchao", "convert_to_float8_training", _float8)
    yield Entry("bitsandbytes.nn", "Linear8bitLt, with a trained head", _bits(_int8))
    yield Entry("bitsandbytes.nn", "Linear4bit (nf4), with a trained head", _bits(_nf4))
    yield Entry("bitsandbytes.nn", "StableEmbedding", _embedding)


def _quantized(config: Callable[[], Any]) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        torch.manual_seed(world.seed)
        body = nn.Sequential(nn.Flatten(), nn.Linear(16, 32))
        low_bit.quantize_(body, config())
        for parameter in body.parameters():
            parameter.requires_grad_(False)
        return _trained(world, nn.Sequential(body, nn.Tanh(), nn.Linear(32, 3)))

    return start


def _fake_quantized(world: World) -> Job:
    torch.manual_seed(world.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    weights = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel")
    low_bit.quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"))
    return _trained(world, model)


def _float8(world: World) -> Job:
    torch.manual_seed(world.seed)
    config = torchao.float8.Float8LinearConfig(emulate=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    return _trained(world, torchao.float8.convert_to_float8_training(model, config=config))


def _int8() -> nn.Module:
    return bitsandbytes.nn.Linear8bitLt(16, 64, has_fp16_weights=False).to("cpu")


def _nf4() -> nn.Module:
    return bitsandbytes.nn.Linear4bit(16, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")


def _bits(build: Callable[[], nn.Module]) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        torch.manual_seed(world.seed)
        body = build()
        for parameter in body.parameters():
            parameter.requires_grad_(False)
        return _trained(world, nn.Sequential(nn.Flatten(), body, nn.Tanh(), nn.Linear(64, 3)))

    return start


def _embedding(world: World) -> Job:
    torch.manual_seed(world.seed)
    model = world.shard(nn.Sequential(bitsandbytes.nn.StableEmbedding(8, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(number: int) -> float:
        optimizer.zero_grad()
        loss = model(world.batch(number, 3).mul(2).abs().long().clamp(max=7)).pow(3).mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Job({"model": model, "optimizer": optimizer}, step)


def _adapters() -> Iterator[Entry]:
    options: dict[str, dict[str, Any]] = {
        "LoraConfig": {"lora_dropout": 0.1},
        "LoraConfig(use_dora=True)": {"use_dora": True},
        "LoraConfig(modules_to_save)": {"modules_to_save": ["2"]},
        "LoraConfig, two adapters": {},
    }
    for name, more in options.items():
        yield Entry("peft", name, _lora(more, "two" in name))


def _lora(options: dict[str, Any], second: bool) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        torch.manual_seed(world.seed)
        bare = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))
        config = peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights="gaussian", **options)
        model = peft.get_peft_model(bare, config)
        if second:
            model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["2"]))
            model.base_model.set_adapter(["default", "second"])
        return _trained(world, model)

    return start


def _metrics() -> Iterator[Entry]:
    def multiclass(kind: Any, **more: Any) -> Callable[[], Any]:
        return lambda: kind(task="multiclass", num_classes=3, **more)

    kinds: dict[str, Callable[[], Any]] = {
        "Accuracy": multiclass(torchmetrics.Accuracy),
        "AUROC (a list of tensors)": multiclass(torchmetrics.AUROC),
        "ConfusionMatrix": multiclass(torchmetrics.ConfusionMatrix),
        "MetricCollection": lambda: torchmetrics.MetricCollection(
            [multiclass(torchmetrics.Accuracy)(), multiclass(torchmetrics.F1Score)()]
        ),
        "MinMaxMetric": lambda: torchmetrics.MinMaxMetric(multiclass(torchmetrics.Accuracy)()),
        "ClasswiseWrapper": lambda: torchmetrics.ClasswiseWrapper(multiclass(torchmetrics.Accuracy, average=None)()),
        "BootStrapper": lambda: torchmetrics.BootStrapper(multiclass(torchmetrics.Accuracy)(), num_bootstraps=3),
    }
    for name, make in kinds.items():
        yield Entry("torchmetrics", f"{name}, persistent", _metric(make, True))
    yield Entry("torchmetrics", "Accuracy, persistent, without `PerRank`", _metric(kinds["Accuracy"], True, False))
    yield Entry("torchmetrics", "Accuracy, not persistent (the default)", _metric(kinds["Accuracy"], False))
    means: dict[str, Callable[[], Any]] = {
        "MeanMetric": torchmetrics.MeanMetric,
        "CatMetric": torchmetrics.CatMetric,
        "RunningMean": lambda: torchmetrics.RunningMean(window=2),
        "MetricTracker": lambda: torchmetrics.MetricTracker(torchmetrics.MeanMetric()),
    }
    for name, make in means.items():
        yield Entry("torchmetrics", f"{name}, persistent", _mean(make))


def _own(world: World, metric: Any) -> Any:
    """Each rank has values of its own, of its own batches."""
    return ce.PerRank(metric) if world.size > 1 else metric


def _metric(make: Callable[[], Any], persistent: bool, alone: bool = True) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        model, metric = mixed(world), make()
        metric.persistent(persistent)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def look(number: int, _: torch.Tensor) -> None:
            metric.update(
                world.batch(number, 3).softmax(1), world.batch(number + 50).abs().mul(1.5).long().clamp(max=2)
            )

        job = train(world, model, optimizer, more={"metric": _own(world, metric) if alone else metric}, after=[look])
        return _ending(job, metric)

    return start


def _mean(make: Callable[[], Any]) -> Callable[[World], Job]:
    def start(world: World) -> Job:
        model, metric = mixed(world), make()
        _persist(metric)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def look(_: int, loss: torch.Tensor) -> None:
            if isinstance(metric, torchmetrics.MetricTracker):
                metric.increment()
                _persist(metric)
            metric.update(loss.detach())

        return _ending(train(world, model, optimizer, more={"metric": _own(world, metric)}, after=[look]), metric)

    return start


def _persist(metric: Any) -> None:
    for module in metric.modules():
        if isinstance(module, torchmetrics.Metric):
            module.persistent(True)


def _ending(job: Job, metric: Any) -> Job:
    """The metric's value is told with the loss of the last step, so that it is compared."""
    bare = job.step

    def step(number: int) -> float:
        loss = bare(number)
        if number < 5:
            return loss
        value = metric.compute()
        values = value.values() if isinstance(value, dict) else [value]
        return loss + sum(float(one.detach().double().sum()) for one in values)

    return Job(job.state, step)
