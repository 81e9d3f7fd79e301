"""Numbers that change beside what a state holds: who trains with them is told that they are not saved."""

from __future__ import annotations

import logging
from itertools import count
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptengine as ce  # noqa: E402


class Counting(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.calls, self.loss, self.size, self.on = 0, 1.0, 2, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.loss /= 2
        self.on = not self.on
        return super().forward(x)


class Inside(torch.nn.Module):
    """Saves what the module in it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def get_extra_state(self) -> int:
        return self.inner.calls

    def set_extra_state(self, state: int) -> None:
        self.inner.calls = state


class Warming(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.taken += 1
        super().step(closure)


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def told(
    run: Path, caplog: pytest.LogCaptureFixture, model: torch.nn.Module, kind: Any = plain, steps: int = 5, **more: Any
) -> list[str]:
    """Train and save; return the warnings. `more` of the state are calls that give it at each step."""
    optimizer = kind(model.parameters())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(run, every=1) as checkpointer:
        for step in range(1, steps + 1):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            given = {name: call() for name, call in more.items()}
            checkpointer.step(step, {"parts": {"model": model}, "optimizer": optimizer, **given})
    return [record.getMessage() for record in caplog.records if record.name.startswith("ckptengine")]


def test_a_counter_in_a_module_or_an_optimizer_that_is_not_saved_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.compile(Counting(), backend="eager"))
    (text,) = told(tmp_path, caplog, model, Warming, 9)
    assert "parts.model.1.calls (1 before, now 2), optimizer.taken (1 before, now 2). If" in text
    assert "a buffer of the module" in text
    assert "the optimizer's param_groups" in text


def test_a_counter_that_changes_rarely_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Epochs(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.epoch = self.calls // 6
            return super().forward(x)

    _, text = told(tmp_path, caplog, Epochs(), steps=9)
    assert "parts.model.epoch (0 before, now 1)" in text
    assert "calls" not in text


def test_nothing_is_told_of_what_is_saved_or_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def scheduled(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 2)  # patches the optimizer
        return optimizer

    assert told(tmp_path, caplog, torch.nn.Sequential(Inside(), torch.nn.Dropout(0.5)), scheduled) == []


def test_a_counter_that_the_state_has_under_its_name_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = Counting(), Counting()
    assert told(tmp_path / "one", caplog, one, calls=lambda: one.calls) == []
    assert told(tmp_path / "other", caplog, other, noted=lambda: [{"calls": other.calls}]) == []


def test_another_object_in_the_place_of_one_is_not_compared_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made() -> torch.nn.Module:
        module = Counting()
        module.size = next(sizes)
        return module

    sizes = count()
    assert told(tmp_path, caplog, torch.nn.Linear(2, 2), head=made) == []
    for number in range(4):
        ce.save(tmp_path / "alone", {"head": made(), "number": number})
    assert caplog.messages == []


def test_classes_that_answer_oddly_are_saved_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Counting):
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            return {1: 2, **super().__dict__}

    class Placeless(Counting):
        __module__ = None  # type: ignore[assignment]

    model = torch.nn.Sequential(Odd(), Placeless())
    assert told(tmp_path, caplog, model) == []
    assert ce.load(tmp_path, into={"parts": {"model": model}}, strict=False) is not None
