"""A tied weight of which the first stage has the one end and the last the other, and what optimizers keep for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from stages import StageJob, State
from torch import nn

from ckptengine.errors import LoadMismatchError

ENDS = ("embed", "head")
Made = Callable[..., list["Part"]]


class OwnAdamW(torch.optim.AdamW):
    """One that says itself what its state is."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mood": "good"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "mood"})


class Part:
    """Some of a model's ends, with what AdamW keeps for them: in one memory where the model has both and ties them."""

    def __init__(self, names: tuple[str, ...], seed: int, kind: Any = torch.optim.AdamW, steps: int = 1) -> None:
        torch.manual_seed(seed)
        made = {"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)}
        made["head"].weight = nn.Parameter(made["embed"].weight.detach().clone())
        self.model = nn.ModuleDict({name: made[name] for name in names})
        if len(names) == 2:
            self.model["head"].weight = self.model["embed"].weight
        self.optimizer = kind(self.model.parameters(), lr=0.1)
        for _ in range(steps):
            for parameter in self.model.parameters():
                parameter.grad = parameter.detach() * 0.5
            self.optimizer.step()
        self.state: State = {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> list[torch.Tensor]:
        (parameter,) = self.model.parameters()
        return [parameter.detach(), *self.optimizer.state[parameter].values()]


def whole(seed: int = 0, **options: Any) -> list[Part]:
    return [Part(ENDS, seed, **options)]


def stages(seed: int = 0, **options: Any) -> list[Part]:
    return [Part((name,), seed, **options) for name in ENDS]


def save(run: Path, parts: list[Part]) -> None:
    with StageJob(run, len(parts)) as job:
        job.save(part.state for part in parts)


def load(run: Path, parts: list[Part]) -> None:
    with StageJob(run, len(parts)) as job:
        job.load(part.state for part in parts)


def same(parts: list[Part], others: list[Part]) -> bool:
    pairs = [(part, other) for part in parts for other in others]
    return all(torch.equal(a, b) for p, o in pairs for a, b in zip(p.tensors(), o.tensors(), strict=True))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, OwnAdamW])
@pytest.mark.parametrize("here", [whole, stages])
@pytest.mark.parametrize("there", [whole, stages])
def test_both_ends_get_weight_and_moments_and_one_takes_those_of_both(
    tmp_path: Path, there: Made, here: Made, kind: Any
) -> None:
    save(tmp_path, saved := there(0, kind=kind))
    target = here(1, kind=kind)
    assert not same(target, saved)
    load(tmp_path, target)
    assert same(target, saved)


def test_without_state_the_optimizer_of_each_end_gets_it(tmp_path: Path) -> None:
    save(tmp_path, saved := whole())
    target = stages(1, steps=0)
    load(tmp_path, target)
    assert same(target, saved)


def test_moments_of_two_ends_that_differ_are_no_state_of_one_tied_weight(tmp_path: Path) -> None:
    parts = stages()
    ((_, last),) = parts[1].optimizer.state.items()
    last["exp_avg"].add_(1)
    save(tmp_path, parts)
    target = whole(1)
    with pytest.raises(LoadMismatchError, match=r"state\.model\.head\.weight\.exp_avg: the same memory as .*embed"):
        load(tmp_path, target)


def test_state_that_only_one_of_two_ends_has_is_no_state_of_one_tied_weight(tmp_path: Path) -> None:
    parts = stages()
    ((_, last),) = parts[1].optimizer.state.items()
    last["more"] = torch.ones(())
    save(tmp_path, parts)
    with pytest.raises(LoadMismatchError, match=r"model\.head\.weight: one tied parameter here, .* 'more' differs"):
        load(tmp_path, whole(1))


def test_groups_of_two_ends_with_other_rates_are_no_group_of_one_tied_weight(tmp_path: Path) -> None:
    parts = stages()
    parts[1].optimizer.param_groups[0]["lr"] = 0.2
    save(tmp_path, parts)
    with pytest.raises(LoadMismatchError, match=r"can't have one 'lr': in the checkpoint it is 0\.1 .* 0\.2"):
        load(tmp_path, whole(1))


def test_an_optimizer_that_knows_both_ends_apart_takes_no_state_of_one_tied_weight(tmp_path: Path) -> None:
    save(tmp_path, whole())
    target = Part(ENDS, 1)
    target.model["head"].weight = nn.Parameter(target.model["embed"].weight.detach().clone())
    target.optimizer.add_param_group({"params": [target.model["head"].weight]})
    with pytest.raises(LoadMismatchError, match=r"model\.head\.weight|parameter groups"):
        load(tmp_path, [target])
