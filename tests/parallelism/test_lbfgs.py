"""LBFGS keeps one history for all of its parameters, after each other: it fits the same ones in the same order."""

import pytest
import torch
from stages import StageJob
from torch import nn

import ckptengine as ce
from ckptengine.errors import LoadMismatchError


def trained(names: str, steps: int, **options):
    """Return a state with layers of these names, after some steps."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(2, 2) for name in "abc"}
    model = nn.ModuleDict({name: layers[name] for name in names})
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(parameters[::-1] if options else parameters, lr=0.1, max_iter=3)
    train(model, optimizer, steps)
    return {"model": model, "optimizer": optimizer}


def train(model, optimizer, steps: int) -> None:
    def closure():
        optimizer.zero_grad()
        loss = sum((layer(torch.ones(2)) - 1).square().sum() * (n + 1) for n, layer in enumerate(model.values()))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def test_parameters_in_another_order_are_refused(tmp_path):
    """The state belonged to what is no longer the first parameter: LBFGS began anew and kept the old one beside it."""
    ce.save(tmp_path / "saved", trained("ab", 3))
    other = trained("ab", 0, backwards=True)
    with pytest.raises(LoadMismatchError, match=r"optimizer: .*parameter 0 is model.a.weight .*model.b.bias here"):
        ce.load(tmp_path / "saved", into=other)
    assert not other["optimizer"].state
    report = ce.load(tmp_path / "saved", into=other, strict=False)
    assert [text.partition(":")[0] for text in report.mismatched] == ["optimizer"]
    assert not other["optimizer"].state


def test_a_training_goes_on_with_the_same_parameters(tmp_path):
    state = trained("ab", 3)
    ce.save(tmp_path / "saved", state)
    other = trained("ab", 1)
    ce.load(tmp_path / "saved", into=other)
    for one in (state, other):
        train(one["model"], one["optimizer"], 2)
    for here, there in zip(other["model"].parameters(), state["model"].parameters(), strict=True):
        assert torch.equal(here, there)


def test_each_stage_gets_its_own_history_and_one_process_is_refused_those_of_several(tmp_path):
    saved = [trained("ab", 3), trained("c", 2)]
    with StageJob(tmp_path / "run", 2) as job:
        job.save(saved)
    found = [trained("ab", 1), trained("c", 0)]
    with StageJob(tmp_path / "run", 2) as job:
        job.load(found)
    for here, there in zip(found, saved, strict=True):
        (own,), (other,) = here["optimizer"].state.values(), there["optimizer"].state.values()
        assert torch.equal(own["d"], other["d"])
        assert own["n_iter"] == other["n_iter"]
    with pytest.raises(LoadMismatchError, match="4 parameters in the checkpoint, 6 here"):
        ce.load(tmp_path / "run", into=trained("abc", 0))
