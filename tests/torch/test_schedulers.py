"""Training goes on equal after a load, whatever scheduler there is: same losses, learning rates, weights."""

import functools
from typing import Any

import pytest
import torch
from state_memory import load, save
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.state.values import encode


class Decay:
    """A callable object: torch saves what it remembers."""

    def __init__(self) -> None:
        self.calls, self.rates = 0, {"late": 0.5, "early": 0.9}

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return self.rates["late" if self.calls > 4 else "early"] ** epoch


# fmt: off
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "LambdaLR of a partial": lambda o: lr_scheduler.LambdaLR(o, functools.partial(pow, 0.9)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "MultiplicativeLR of an object": lambda o: lr_scheduler.MultiplicativeLR(o, Decay()),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 4)], [4]
    ),
    "SequentialLR with a lambda": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LambdaLR(o, lambda epoch: (epoch + 1) / 4), lr_scheduler.CosineAnnealingLR(o, 4)], [4]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "CyclicLR with a lambda": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, scale_fn=lambda x: 0.9**x),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "OneCycleLR of three phases": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=10, three_phase=True, anneal_strategy="linear"
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=4),
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda model: torch.optim.SGD(groups(model), lr=0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(groups(model), lr=0.01),
    "AdamW with a tensor": lambda model: torch.optim.AdamW(groups(model), lr=torch.tensor(0.01)),
}
# fmt: on


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [model[0].weight]}, {"params": [model[0].bias], "weight_decay": 0.0}]  # type: ignore[index]


def make(optimizer: str, scheduler: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2))
    made = OPTIMIZERS[optimizer](model)
    return {"model": model, "optimizer": made, "scheduler": SCHEDULERS[scheduler](made)}


def train(state: dict[str, Any], first: int, last: int) -> list[Any]:
    seen: list[Any] = []
    model, optimizer, scheduler = state["model"], state["optimizer"], state["scheduler"]
    for step in range(first, last):
        torch.manual_seed(step)
        loss = model(torch.randn(5, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(float(step % 3))
        else:
            scheduler.step()
        seen.append([loss.item(), [float(group["lr"]) for group in optimizer.param_groups]])
        seen.append([group.get("betas", group.get("momentum")) for group in optimizer.param_groups])
    return [*seen, *(parameter.tolist() for parameter in model.parameters())]


def test_no_scheduler_of_torch_is_left_out() -> None:
    assert {name.partition(" ")[0] for name in SCHEDULERS} >= set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_training_goes_on_equal_with(scheduler: str, optimizer: str) -> None:
    for steps in (0, 3):
        state = make(optimizer, scheduler)
        train(state, 0, steps)
        stored = save(state)
        expected = train(state, steps, 8)
        target = make(optimizer, scheduler)
        train(target, 20, 22)
        assert load(stored, target).complete
        assert train(target, steps, 8) == expected


def test_a_schedule_begun_after_the_restore_finds_its_groups_as_they_were_saved() -> None:
    state = make("AdamW", "CosineAnnealingLR")
    train(state, 0, 3)
    stored = save({"model": state["model"], "optimizer": state["optimizer"]})
    rates = [(group["lr"], group["initial_lr"]) for group in state["optimizer"].param_groups]
    model = nn.Sequential(nn.Linear(4, 2))
    optimizer = OPTIMIZERS["AdamW"](model)
    assert "initial_lr" not in optimizer.param_groups[0]
    assert load(stored, {"model": model, "optimizer": optimizer}).complete
    assert [(group["lr"], group["initial_lr"]) for group in optimizer.param_groups] == rates
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 5, last_epoch=3)
    target = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    rates_after = [step[1] for step in train(target, 3, 6)[:6:2]]
    assert rates_after[0] != rates[0][0]
    scheduled = load(save({"scheduler": state["scheduler"]}), {"scheduler": scheduler}, strict=True)
    assert scheduled.complete


@pytest.mark.parametrize("kind", ["LambdaLR", "StepLR", "ChainedScheduler", "SequentialLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize(("saved", "here"), [(2, 3), (3, 2)])
def test_a_scheduler_of_another_number_of_groups_is_refused_before_the_load(kind: str, saved: int, here: int) -> None:
    """torch takes it; some groups then had no rate, or a step failed, or what LambdaLR kept differed after the load."""

    def scheduler_of(count: int) -> Any:
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in range(count)], lr=0.1)
        return SCHEDULERS[kind](optimizer)

    stored, target = save({"n": 1, "scheduler": scheduler_of(saved)}), {"n": 0, "scheduler": scheduler_of(here)}
    before = encode(target["scheduler"].state_dict(), ())
    said = rf"scheduler: a scheduler of {saved} parameter groups in the checkpoint, of {here} here .*last_epoch"
    with pytest.raises(LoadMismatchError, match=said):
        load(stored, target, strict=True)
    report = load(stored, target, strict=False)
    assert [line.partition(":")[0] for line in report.mismatched] == ["scheduler"]
    assert encode(target["scheduler"].state_dict(), ()) == before


@pytest.mark.parametrize("kind", ["ExponentialLR", "StepLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("steps", [0, 3])
def test_training_goes_on_equal_where_a_group_was_added_after_the_scheduler_was_made(kind: str, steps: int) -> None:
    """What torch rewrites, or repairs, at a step has the new number of groups then, and the old one until then."""

    def fresh() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2))
        optimizer = torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[kind](optimizer)
        optimizer.add_param_group({"params": [model[0].bias], "lr": 0.2})
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    state, target = fresh(), fresh()
    train(state, 0, steps)
    stored = save(state)
    assert load(stored, target).complete
    assert train(target, steps, 8) == train(state, steps, 8)


def test_groups_that_were_saved_without_a_schedule_keep_the_one_that_is_here() -> None:
    bare = make("SGD", "StepLR")
    plain = OPTIMIZERS["SGD"](bare["model"])
    target = make("SGD", "StepLR")
    assert load(save({"optimizer": plain}), {"optimizer": target["optimizer"]}).complete
    assert [group["initial_lr"] for group in target["optimizer"].param_groups] == [0.1, 0.1]
    train(target, 0, 3)


@pytest.mark.parametrize(
    ("held", "advice"),
    [(lambda epoch: 1.0, "plain functions and lambdas"), (bytearray(2), "to bytes"), (object(), r"state_dict\(\)")],
)
def test_a_callable_that_holds_what_cannot_be_saved_is_named_with_what_to_do(held: Any, advice: str) -> None:
    decay = Decay()
    decay.rates["odd"] = held  # type: ignore[assignment]
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, decay)
    with pytest.raises(StateError, match=rf"scheduler\.lr_lambdas\.0\.rates\.odd: .* can't be saved.*{advice}"):
        encode(scheduler.state_dict(), ("scheduler",))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_gradient_scaler_goes_on_where_it_was(steps: int, used: bool) -> None:
    def run(state: dict[str, Any], first: int, last: int) -> list[float]:
        seen = []
        for step in range(first, last):
            torch.manual_seed(step)
            scaler, optimizer = state["scaler"], state["optimizer"]
            loss = state["model"](torch.randn(5, 4)).square().mean() * (float("inf") if step == 5 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen += [loss.item(), scaler.get_scale()]
        return seen

    def fresh(scale: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "scaler": scaler}

    state, target = fresh(8.0), fresh(64.0)
    run(state, 0, steps)
    stored = save(state)
    if used:
        run(target, 20, 23)
    assert load(stored, target).complete
    assert run(target, steps, 9) == run(state, steps, 9)


def test_a_scaler_that_was_switched_off_is_refused_by_name() -> None:
    stored = save({"scaler": torch.amp.GradScaler("cpu", enabled=False)})
    with pytest.raises(LoadMismatchError, match=r"scaler: load_state_dict of .*GradScaler refused .*disabled"):
        load(stored, {"scaler": torch.amp.GradScaler("cpu")})
