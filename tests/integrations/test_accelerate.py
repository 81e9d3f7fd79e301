"""A loop that Accelerate has prepared: killed in mid-epoch and started again, it ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate_job as job
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from lives import KILLED, life, lives
from torch.utils.data import DataLoader

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.integrations.accelerate import Prepared


def run(place: Path, name: str, settings: dict[str, Any], code: int = 0) -> str:
    """Run a life of the job `name` and return what it has printed."""
    log = place / f"{name}.log"
    assert life(lambda: job.train(place / name, place / f"{name}.out", settings), log) == code, log.read_text()
    return log.read_text()


def differing(place: Path, rank: int = 0) -> list[str]:
    """Return what the killed job has ended with, and the other one not."""
    one, other = (torch.load(place / f"{name}.out-{rank}.pt", weights_only=False) for name in ("through", "killed"))
    tensors, others = (found.pop("tensors") | {"random": found.pop("random")} for found in (one, other))
    assert tensors.keys() == others.keys()
    wrong = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    return wrong + [name for name in one if one[name] != other[name]]


@pytest.mark.parametrize(
    ("settings", "kills"),
    [
        pytest.param({}, [3, 22, 27], id="one-batch-a-step"),
        pytest.param({"accumulation": 3}, [5], id="gradient-accumulation"),
        pytest.param({"loader": {"use_seedable_sampler": True}}, [15], id="a-seedable-sampler"),
        pytest.param({"look": True}, [15], id="an-evaluation-between-the-steps"),
        pytest.param({"workers": 1, "crops": False}, [15], id="loader-workers-that-draw-nothing"),
    ],
)
def test_it_ends_with_the_weights_averages_and_random_streams_of_a_loop_that_was_not_killed(
    tmp_path: Path, settings: dict[str, Any], kills: list[int]
) -> None:
    run(tmp_path, "through", settings)
    for step in kills:
        run(tmp_path, "killed", settings | {"kill": step}, KILLED)
    run(tmp_path, "killed", settings)
    assert differing(tmp_path) == []


def test_so_do_two_ranks(tmp_path: Path) -> None:
    """With torch's own sampler, whose generator Accelerate shares between the ranks, in the second epoch."""

    def ranks(name: str, settings: dict[str, Any]) -> list[int]:
        return lives([lambda: job.train(tmp_path / name, tmp_path / f"{name}.out", settings)] * 2, tmp_path / "log")

    assert ranks("through", {}) == [0, 0], (tmp_path / "log").read_text()
    assert KILLED in ranks("killed", {"kill": 9, "rank": 1})
    assert ranks("killed", {}) == [0, 0], (tmp_path / "log").read_text()
    assert differing(tmp_path) + differing(tmp_path, 1) == []


@pytest.mark.parametrize("fsdp", [{"fsdp": 1, "original": True}, {"fsdp": 1, "original": False}, {"fsdp": 2}], ids=str)
def test_so_do_two_ranks_under_fsdp(tmp_path: Path, fsdp: dict[str, Any]) -> None:
    def ranks(name: str, settings: dict[str, Any]) -> list[int]:
        both = [lambda: job.train(tmp_path / name, tmp_path / f"{name}.out", settings | fsdp)] * 2
        return lives(both, tmp_path / "log")

    assert ranks("through", {}) == [0, 0], (tmp_path / "log").read_text()
    assert KILLED in ranks("killed", {"kill": 9, "rank": 1})
    assert ranks("killed", {}) == [0, 0], (tmp_path / "log").read_text()
    assert differing(tmp_path) + differing(tmp_path, 1) == []


def prepared(rows: int = 12, batch: int = 2, **config: Any) -> tuple[Accelerator, Any, Any, Prepared]:
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(**config)
    )
    data = torch.arange(rows).float().reshape(-1, 1)
    model, loader = accelerator.prepare(torch.nn.Linear(1, 1), DataLoader(data, batch, shuffle=True))  # type: ignore[arg-type]
    return accelerator, model, loader, Prepared(accelerator)


def test_a_place_in_other_data_is_refused(tmp_path: Path) -> None:
    _, _, loader, loop = prepared()
    for batch, _ in enumerate(loop.batches(loader)):
        if batch == 2:
            break
    ce.save(tmp_path / "one", loop.state())
    for rows, batch in ((14, 2), (12, 4)):
        with pytest.raises(LoadMismatchError, match="no place in this data"):
            ce.load(tmp_path / "one", into=prepared(rows, batch)[-1].state())
    _, _, loader, loop = prepared(batch=3)  # six samples are two batches of three
    ce.load(tmp_path / "one", into=loop.state())
    assert len(list(loop.batches(loader))) == 2


def test_a_save_in_the_middle_of_an_accumulation_is_refused(tmp_path: Path) -> None:
    accelerator, model, _, loop = prepared()
    with accelerator.accumulate(model), pytest.raises(StateError, match="sync_gradients"):
        ce.save(tmp_path / "one", loop.state())


def test_what_is_not_followed_is_refused() -> None:
    _, _, loader, loop = prepared()
    with pytest.raises(ValueError, match="the loader that `prepare` returned"):
        loop.batches(loader.base_dataloader)
    with pytest.raises(StateError, match="use_stateful_dataloader"):
        prepared(use_stateful_dataloader=True)
