"""Buffers of which a declaration says nothing are one for all ranks, and where they are not, that is said."""

import logging

import pytest
import torch
from stages import StageJob
from torch import nn

import ckptengine as ce
from ckptengine.errors import ReplicaMismatchError


def layer(rank: int, same: bool) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((2, 3), float(rank)))
    module.register_buffer("mask", torch.ones(3))
    module.register_buffer("tokens", torch.full((2,), 0.0 if same else float(rank)))
    return module


def saved(run, same: bool, rules) -> None:
    with StageJob(run, 2) as job:
        states = job.each(lambda rank: {"model": ce.Sharded(layer(rank, same), rules, comm=job.comm(rank))})
        job.save(states)
        job.save(states)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if one.levelno == logging.WARNING and "buffers" in one.message]


def test_a_buffer_that_no_pattern_fits_and_that_differs_between_ranks_is_named_once(tmp_path, caplog):
    saved(tmp_path / "run", False, {"weight": ce.Shard(0)})
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("model.tokens: buffers")
    assert "not rank 0's on rank 1" in warnings(caplog)[0]


@pytest.mark.parametrize("same", [True, False])
def test_nothing_is_said_of_buffers_that_are_equal_or_declared(same, tmp_path, caplog):
    saved(tmp_path / "run", same, {"weight": ce.Shard(0)} | ({} if same else {"tokens": ce.PerRank}))
    assert warnings(caplog) == []


@pytest.mark.parametrize("inside", ["a dict", "an object"])
def test_tensors_that_nobody_declared_are_refused_as_soon_as_they_differ_also_if_they_began_equal(tmp_path, inside):
    """Averages that begin at zero, saved before the first step: one rank's part would count for all."""

    class Averages:
        def __init__(self) -> None:
            self.shadow = {"weight": torch.zeros(2, 3)}

        def state_dict(self) -> dict:
            return self.shadow

        def load_state_dict(self, state: dict) -> None:
            self.shadow = state

    averages = [Averages() for _ in range(2)]
    with StageJob(tmp_path / "run", 2) as job:
        states = job.each(
            lambda rank: {
                "model": ce.Sharded(layer(rank, True), {"weight": ce.Shard(0)}, comm=job.comm(rank)),
                "averages": averages[rank].shadow if inside == "a dict" else averages[rank],
            }
        )
        job.save(states)
        for state, one in zip(states, averages, strict=True):
            one.shadow["weight"] += state["model"].value.weight.detach()
        with pytest.raises(ReplicaMismatchError, match=r"averages\.weight: the replicas on rank 1 differ.*Sharded"):
            job.save(states)
        for one in averages:
            one.shadow["weight"].zero_()
        job.save(states)
