"""Optimizers over square parts of declared parameters: moments go to another split, preconditioners are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stages import StageJob
from torch import nn

import ckptengine as ce
from ckptengine.errors import StateError


class Shampooed(torch.optim.Optimizer):
    """Keeps a moment `m` of a parameter and a preconditioner `left` of its rows."""

    def __init__(self, params: Any, keep: tuple[str, ...]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.keep = keep

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                new = {"m": grad.clone(), "left": grad.reshape(len(grad), -1) @ grad.reshape(len(grad), -1).T}
                self.state[parameter] |= {key: new[key] for key in self.keep}


def state(job: StageJob, rank: int, rows: int, keep: tuple[str, ...], wide: bool, **options: Any) -> dict[str, Any]:
    """A rank's part of a matrix of 8 × 4, and with `wide` a whole one of 4 × 6."""
    model = nn.ParameterDict({"split": nn.Parameter(torch.zeros(rows, 4))})
    if wide:
        model["whole"] = nn.Parameter(torch.zeros(4, 6))
    optimizer = Shampooed(model.parameters(), keep)
    for name, parameter in model.items():
        parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
        parameter.grad += 100.0 * rank * (name == "split")
    optimizer.step()
    declared = ce.Sharded(model, {"split": ce.Shard(0)}, comm=job.comm(rank), timeout=20, **options)
    return {"model": declared, "optimizer": optimizer}


@pytest.mark.parametrize(("wide", "options"), [(True, {}), (False, {"moments": ["m"]})])
def test_a_moment_of_a_square_part_goes_to_another_split(tmp_path: Path, wide: bool, options: dict[str, Any]) -> None:
    with StageJob(tmp_path / "run", 2) as job:
        saved = job.each(lambda rank: state(job, rank, 4, ("m",), wide, **options))
        job.save(saved)
    whole = torch.cat([one["optimizer"].state[one["model"].value["split"]]["m"] for one in saved])
    with StageJob(tmp_path / "run", 4) as job:
        found = job.each(lambda rank: state(job, rank, 2, ("m",), wide, **options))
        job.load(found)
    for rank, one in enumerate(found):
        moment = one["optimizer"].state[one["model"].value["split"]]["m"]
        assert torch.equal(moment, whole[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("keep", [("m", "left"), ("left",)])
def test_a_preconditioner_of_a_square_part_is_refused_by_name(
    tmp_path: Path, wide: bool, keep: tuple[str, ...]
) -> None:
    with StageJob(tmp_path / "run", 2) as job:
        of = job.each(lambda rank: state(job, rank, 4, keep, wide, moments=["m"]))
        with pytest.raises(StateError, match=r"optimizer\.state\.model\.split\.left: .* square matrix"):
            job.save(of)


def test_a_preconditioner_of_a_whole_square_matrix_is_not_cut(tmp_path: Path) -> None:
    """One process has saved it of the whole matrix of 8 × 8; two ranks have squares of 8 × 8 in it no more."""
    model = nn.ParameterDict({"split": nn.Parameter(torch.ones(8, 8))})
    optimizer = Shampooed(model.parameters(), ("left",))
    model["split"].grad = torch.ones(8, 8)
    optimizer.step()
    with StageJob(tmp_path / "run", 1) as job:
        job.save([{"model": model, "optimizer": optimizer}])
    with StageJob(tmp_path / "run", 2) as job:

        def fresh(rank: int) -> dict[str, Any]:
            part = nn.ParameterDict({"split": nn.Parameter(torch.zeros(4, 8))})
            declared = ce.Sharded(part, {"split": ce.Shard(0)}, comm=job.comm(rank), timeout=20)
            return {"model": declared, "optimizer": Shampooed(part.parameters(), ("left",))}

        of = job.each(fresh)
        with pytest.raises(StateError, match=r"optimizer\.state\.model\.split\.left: .* square matrix"):
            job.load(of)
