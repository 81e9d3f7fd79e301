"""A rank with several chunks of a model, each with an optimizer of its own: in the checkpoint they are one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stages import StageJob
from torch import nn

import ckptengine as ce
from ckptengine.comm.base import Communicator
from ckptengine.errors import StateError

LAYERS = 4


def chunks(ranks: int, rank: int, seed: int, *, one_each: bool, kind: Any = torch.optim.AdamW) -> dict[str, Any]:
    """Return a rank's state: of its layers each is a chunk, all with one optimizer or one for each."""
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 3) for _ in range(LAYERS)]
    mine = {number: layers[number] for number in range(rank, LAYERS, ranks)}
    modules = [nn.ModuleDict({f"layer{number}": layer}) for number, layer in mine.items()]

    def optimizer(of: list[nn.Linear]) -> torch.optim.Optimizer:
        weights = {"params": [one.weight for one in of]}
        made: torch.optim.Optimizer = kind(
            [weights, {"params": [one.bias for one in of], "weight_decay": 0.0}], lr=0.1 + seed
        )
        return made

    layers_here = list(mine.values())
    optimizers = [optimizer([one]) for one in layers_here] if one_each else [optimizer(layers_here)]
    merged = ce.Merged(optimizers) if one_each else optimizers[0]
    return {"model": ce.Merged(modules), "optimizer": merged}


def optimizers_of(state: dict[str, Any]) -> list[torch.optim.Optimizer]:
    one = state["optimizer"]
    return list(one.optimizers) if isinstance(one, ce.Merged) else [one]


def train(state: dict[str, Any]) -> None:
    for module in state["model"].modules:
        for name, parameter in module.named_parameters():
            parameter.grad = torch.full_like(parameter, float(len(name) + int(name[5])))
    for optimizer in optimizers_of(state):
        optimizer.step()


def tensors(states: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    found = {}
    for state in states:
        own = {p: s for one in optimizers_of(state) for p, s in one.state.items()}
        for module in state["model"].modules:
            for name, parameter in module.named_parameters():
                found[name] = parameter.detach().clone()
                found |= {f"{name} {key}": value.clone() for key, value in own.get(parameter, {}).items()}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("before", [(2, True), (2, False), (1, True), (1, False)])
@pytest.mark.parametrize("after", [(2, True), (1, True), (1, False), (4, True)])
def test_an_optimizer_for_each_chunk_is_one_in_the_checkpoint_and_goes_anywhere(
    tmp_path: Path, before: tuple[int, bool], after: tuple[int, bool]
) -> None:
    saved = [chunks(before[0], rank, 0, one_each=before[1]) for rank in range(before[0])]
    with StageJob(tmp_path / "run", before[0]) as job:
        for _ in range(2):  # the second save goes by the first one's plan
            for state in saved:
                train(state)
            job.save(saved)
    groups = ce.load(tmp_path / "run")["optimizer"]["param_groups"]
    assert [sorted(group["params"]) for group in groups] == [
        [f"model.layer{number}.{name}" for number in range(LAYERS)] for name in ("weight", "bias")
    ]
    found = [chunks(after[0], rank, 1, one_each=after[1]) for rank in range(after[0])]
    with StageJob(tmp_path / "run", after[0]) as job:
        assert all(report.complete for report in job.load(found))
    assert same(tensors(found), tensors(saved))
    for state in (*found, *saved):
        for optimizer in optimizers_of(state):
            assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.01), (0.1, 0.0)]
        train(state)
    assert same(tensors(found), tensors(saved))


def test_optimizers_whose_learning_rates_differ_keep_their_own(tmp_path: Path) -> None:
    state = chunks(1, 0, 0, one_each=True)
    for number, optimizer in enumerate(optimizers_of(state)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 + number % 2)
    ce.save(tmp_path / "one", state)
    other = chunks(1, 0, 1, one_each=True)
    for number, optimizer in enumerate(optimizers_of(other)):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * (1 + number % 2)
    ce.load(tmp_path / "one", into=other)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers_of(other)] == [0.1, 0.2, 0.1, 0.2]


def test_what_can_not_be_one_optimizer_is_refused(tmp_path: Path) -> None:
    class Own(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "more": 1}

    one, other = (nn.Linear(2, 2) for _ in range(2))
    adam, sgd = torch.optim.Adam(one.parameters()), torch.optim.SGD(other.parameters())
    for optimizers, message in (
        ([adam, sgd], r"several classes \(Adam, SGD\)"),
        ([sgd, torch.optim.SGD(other.parameters())], "a parameter in common"),
        ([Own(one.parameters()), Own(other.parameters())], "Own has a `state_dict`"),
    ):
        with pytest.raises(StateError, match=message):
            ce.save(tmp_path / "bad", {"optimizer": ce.Merged(optimizers)})
    with pytest.raises(StateError, match=r"not torch\.optim\.sgd\.SGD"):
        ce.Merged([one, sgd])


def with_schedulers(ranks: int, rank: int, *, one_each: bool, kind: Any) -> dict[str, Any]:
    """Return a rank's state with a scheduler for each of its optimizers."""
    state = chunks(ranks, rank, 0, one_each=one_each)
    made = [kind(optimizer) for optimizer in optimizers_of(state)]
    return {**state, "scheduler": ce.Merged(made) if one_each else made[0]}


def schedulers_of(state: dict[str, Any]) -> list[Any]:
    one = state["scheduler"]
    return list(one.objects) if isinstance(one, ce.Merged) else [one]


def rates(state: dict[str, Any]) -> list[list[float]]:
    found = []
    for optimizer, scheduler in zip(optimizers_of(state), schedulers_of(state), strict=True):
        optimizer.step()
        scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("kind", ["step", "warm-up"])
@pytest.mark.parametrize("before", [(2, True), (1, True), (1, False)])
@pytest.mark.parametrize("after", [(2, True), (1, True), (1, False), (4, True)])
def test_a_scheduler_for_each_optimizer_is_one_in_the_checkpoint_and_goes_anywhere(
    tmp_path: Path, before: tuple[int, bool], after: tuple[int, bool], kind: str
) -> None:
    schedules = torch.optim.lr_scheduler

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        if kind == "step":
            return schedules.StepLR(optimizer, 2)
        warm = schedules.LinearLR(optimizer, 0.1, total_iters=2)
        return schedules.SequentialLR(optimizer, [warm, schedules.CosineAnnealingLR(optimizer, 9)], [2])

    saved = [with_schedulers(before[0], rank, one_each=before[1], kind=schedule) for rank in range(before[0])]
    for _ in range(3):
        for state in saved:
            rates(state)
    with StageJob(tmp_path / "run", before[0]) as job:
        job.save(saved)
    found = [with_schedulers(after[0], rank, one_each=after[1], kind=schedule) for rank in range(after[0])]
    with StageJob(tmp_path / "run", after[0]) as job:
        assert all(report.complete for report in job.load(found))
    for _ in range(3):
        expected = rates(saved[0])[0]
        for state in (*saved[1:], *found):
            assert all(one == expected for one in rates(state))


class OnDevice(torch.Tensor):
    """A tensor that numpy can't see, as one on an accelerator."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert the tensor to numpy")


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.25)])
def test_rates_on_a_device_are_compared_there(rates: tuple[float, float]) -> None:
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=rate) for rate in rates]
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 2) for one in optimizers]
    for one, rate in zip(schedulers, rates, strict=True):
        one.base_lrs = [torch.tensor(rate).as_subclass(OnDevice)]
        one._last_lr = [torch.tensor(rate).as_subclass(OnDevice)]
    merged = ce.Merged(schedulers)
    if rates[0] == rates[1]:
        assert float(merged.state_dict()["base_lrs"][0]) == rates[0]
        return
    with pytest.raises(StateError, match=r"differ in base_lrs\.0"):
        merged.state_dict()


def test_schedulers_that_are_not_alike_are_refused_with_what_differs(tmp_path: Path) -> None:
    optimizers = [torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1 * (1 + number)) for number in range(2)]
    merged = ce.Merged([torch.optim.lr_scheduler.StepLR(one, 2) for one in optimizers])
    with pytest.raises(StateError, match=r"numbers 0 and 1 differ in base_lrs\.0; merge those that are alike"):
        ce.save(tmp_path / "bad", {"scheduler": merged})
    other = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.9)
    with pytest.raises(StateError, match="schedulers of one class"):
        ce.Merged([torch.optim.lr_scheduler.StepLR(optimizers[1], 2), other])


def split_chunks(comm: Communicator, ranks_of_stage: int, seed: int, *, one_each: bool) -> dict[str, Any]:
    """Return the state of a rank whose chunks are split by hand over the ranks of its stage."""
    stage, part = divmod(comm.rank, ranks_of_stage)
    stages = comm.world_size // ranks_of_stage
    torch.manual_seed(seed)
    whole = [(torch.randn(6, 4), torch.randn(4, 6)) for _ in range(LAYERS)]
    group = [stage * ranks_of_stage + number for number in range(ranks_of_stage)]

    def chunk(numbers: list[int]) -> nn.ModuleDict:
        layers = {}
        for number in numbers:
            layer, (up, down) = nn.Module(), whole[number]
            layer.up = nn.Parameter(up.chunk(ranks_of_stage, 0)[part].clone())
            layer.down = nn.Parameter(down.chunk(ranks_of_stage, 1)[part].clone())
            layer.bias = nn.Parameter(torch.full((4,), float(number + seed)))
            layers[f"layer{number}"] = layer
        return nn.ModuleDict(layers)

    mine = list(range(stage, LAYERS, stages))
    made = [chunk([number]) for number in mine] if one_each else [chunk(mine)]
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in made]
    rules = {"*.up": ce.Shard(0, group), "*.down": ce.Shard(1, group)}
    return {
        "model": ce.Sharded(ce.Merged(made), rules, comm=comm, timeout=20),
        "optimizer": ce.Merged(optimizers),
    }


@pytest.mark.parametrize("after", [(4, 2, False), (3, 3, False), (4, 1, True), (1, 1, True)])
def test_chunks_that_are_split_by_hand_go_to_other_stages_and_splits(
    tmp_path: Path, after: tuple[int, int, bool]
) -> None:
    with StageJob(tmp_path / "run", 4) as job:
        saved = job.each(lambda rank: split_chunks(job.comm(rank), 2, 0, one_each=True))
        for state in saved:
            for optimizer in state["optimizer"].optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = parameter.detach() + 1
                optimizer.step()
        job.save(saved)
    whole = ce.load(tmp_path / "run")
    assert whole["optimizer"]["state"]["model.layer3.up"]["exp_avg"].shape == (6, 4)
    ranks, of_stage, one_each = after
    with StageJob(tmp_path / "run", ranks) as job:
        found = job.each(lambda rank: split_chunks(job.comm(rank), of_stage, 1, one_each=one_each))
        job.restore(found)
        job.save(found)
    again = ce.load(tmp_path / "run")
    for kind, items in (("model", whole["model"]), *whole["optimizer"]["state"].items()):
        there = again["model"] if kind == "model" else again["optimizer"]["state"][kind]
        assert {name: array.tobytes() for name, array in items.items()} == {
            name: array.tobytes() for name, array in there.items()
        }
