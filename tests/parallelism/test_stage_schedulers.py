"""A scheduler's lists have a number for each group, in the order of the groups: these must be as they were."""

import pytest
import torch
from stages import StageJob
from torch import nn

from ckptengine.errors import LoadMismatchError
from ckptengine.state.values import encode

S = torch.optim.lr_scheduler
KINDS = {
    "lambda": lambda optimizer: S.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "in a chain": lambda optimizer: S.ChainedScheduler(
        [S.ConstantLR(optimizer), S.LinearLR(optimizer, 0.1, total_iters=9)], optimizer
    ),
    "cyclic": lambda optimizer: S.CyclicLR(optimizer, 0.0, [group["lr"] for group in optimizer.param_groups], 5),
    "plateau": lambda optimizer: S.ReduceLROnPlateau(
        optimizer, min_lr=[group["lr"] / 2 for group in optimizer.param_groups]
    ),
}  # fmt: skip


def job(layers: str, kind: str, order: str):
    """Return the state of a rank that has some layers, with its weights and biases in groups of their own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in layers})
    groups = {
        "w": {"params": [layer.weight for layer in model.values()], "lr": 0.1},
        "b": {"params": [layer.bias for layer in model.values()], "lr": 0.01},
    }
    optimizer = torch.optim.SGD([groups[name] for name in order], momentum=0.9)
    return {"model": model, "optimizer": optimizer, "scheduler": KINDS[kind](optimizer)}


def plain(state):
    """Return what a state has in plain values."""
    return {
        "weights": [parameter.tolist() for parameter in state["model"].parameters()],
        "momenta": {n: one["momentum_buffer"].tolist() for n, one in state["optimizer"].state_dict()["state"].items()},
        "groups": state["optimizer"].state_dict()["param_groups"],
        "scheduler": state["scheduler"].state_dict(),
    }


def train(states, steps: int) -> None:
    for state in states:
        for _ in range(steps):
            for parameter in state["model"].parameters():
                parameter.grad = torch.ones_like(parameter)
            state["optimizer"].step()
            if isinstance(state["scheduler"], S.ReduceLROnPlateau):
                state["scheduler"].step(1.0)
            else:
                state["scheduler"].step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(["x", "y"], ["xy"]), (["xy"], ["x", "y"]), (["x", "y"], ["x", "y"])])
def test_groups_in_another_order_than_the_scheduler_has_them_are_refused(tmp_path, kind, before, after):
    """The groups follow their parameters: base_lrs[0] would be that of the other group, from the next step on."""
    saved = [job(layers, kind, "wb") for layers in before]
    train(saved, 3)
    with StageJob(tmp_path / "run", len(before)) as ranks:
        ranks.save(saved)
    with StageJob(tmp_path / "run", len(after)) as ranks:
        refused = [job(layers, kind, "bw") for layers in after]
        untouched = encode([plain(state) for state in refused], ())
        with pytest.raises(LoadMismatchError, match=r"scheduler: .* would give group 0 .*groups in the order"):
            ranks.load(refused)
        assert encode([plain(state) for state in refused], ()) == untouched
        schedulers = encode([state["scheduler"].state_dict() for state in refused], ())
        for report in ranks.load(refused, strict=False):
            assert [line.partition(":")[0] for line in report.mismatched] == ["scheduler"]
        assert encode([state["scheduler"].state_dict() for state in refused], ()) == schedulers
        found = [job(layers, kind, "wb") for layers in after]
        ranks.load(found)
    train([*saved, *found], 2)
    for state in found:
        assert [group["lr"] for group in state["optimizer"].param_groups] == [
            group["lr"] for group in saved[0]["optimizer"].param_groups
        ]


def test_rates_that_were_set_in_the_groups_after_the_schedulers_last_step_come_back(tmp_path):
    """What the scheduler remembers of that step is not what the groups have, in whatever order."""
    saved = job("xy", "lambda", "wb")
    train([saved], 3)
    for group in saved["optimizer"].param_groups:
        group["lr"] = saved["scheduler"].get_last_lr()[1]
    with StageJob(tmp_path / "run", 1) as ranks:
        ranks.save([saved])
    found = [job(layers, "lambda", "wb") for layers in "xy"]
    with StageJob(tmp_path / "run", 2) as ranks:
        ranks.load(found)
    for state in found:
        assert plain(state)["scheduler"] == plain(saved)["scheduler"]
        assert [group["lr"] for group in state["optimizer"].param_groups] == [
            group["lr"] for group in saved["optimizer"].param_groups
        ]


def test_rates_that_the_user_has_set_in_a_scheduler_come_back(tmp_path):
    saved = [job(layers, "lambda", "wb") for layers in "xy"]
    for state in saved:
        state["scheduler"].base_lrs = [0.5, 0.7]
    with StageJob(tmp_path / "run", 2) as ranks:
        ranks.save(saved)
    found = job("xy", "lambda", "wb")
    with StageJob(tmp_path / "run", 1) as ranks:
        ranks.load([found])
    assert found["scheduler"].base_lrs == [0.5, 0.7]
