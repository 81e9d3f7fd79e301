"""Numbers that change beside what a state holds: who trains with them is told that they are not saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptengine as ce  # noqa: E402


class Counting(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.calls, self.scale, self.size, self.on = 0, 1.0, 2, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.on = not self.on
        return super().forward(x) * self.scale


class Saved(Counting):
    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state


class Warming(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.taken += 1
        super().step(closure)


def trained(run: Path, caplog: pytest.LogCaptureFixture, model: torch.nn.Module, kind: Any, steps: int) -> list[str]:
    optimizer = kind(model.parameters())
    state = {"parts": {"model": model}, "optimizer": optimizer}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(run, every=1) as checkpointer:
        for step in range(1, steps + 1):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            checkpointer.step(step, state)
    return [text for text in caplog.messages if "no state_dict() holds it" in text]


def test_a_number_that_the_state_has_under_its_name_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Noted:
        """Saves the count of a model, as hooks of trainers do."""

        def __init__(self, model: Counting) -> None:
            self.model = model

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.model.calls}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.model.calls = state["calls"]

    model = Counting()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(tmp_path, every=1) as checkpointer:
        for step in range(1, 5):
            model(torch.ones(1, 2))
            checkpointer.step(step, {"model": model, "noted": Noted(model)})
    assert caplog.messages == []


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_counter_in_a_module_or_an_optimizer_that_is_not_saved_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = trained(tmp_path, caplog, torch.nn.Sequential(torch.nn.Linear(2, 2), Counting()), Warming, 9)
    assert len(told) == 1
    assert "parts.model.1.calls (1 before, now 2), optimizer.taken (1 before, now 2); if" in told[0]
    assert "get_extra_state" in told[0]


def test_a_number_that_changes_rarely_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Annealed(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            self.temperature = 0.5 ** (self.calls // 6)
            return super().forward(x)

    told = trained(tmp_path, caplog, Annealed(2, 2), plain, 9)
    assert len(told) == 2
    assert "parts.model.temperature (1.0 before, now 0.5)" in told[1]
    assert "calls" not in told[1]


def test_nothing_is_told_of_what_is_saved_or_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def scheduled(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 2)  # patches the optimizer
        return optimizer

    model = torch.nn.Sequential(Saved(), torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))
    assert trained(tmp_path, caplog, model, scheduled, 4) == []
