"""Buffers of which a declaration says nothing are one for all ranks, and where they are not, that is said."""

import logging

import pytest
import torch
from stages import StageJob
from torch import nn

import ckptengine as ce


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
