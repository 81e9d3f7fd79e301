"""Runs for `ckptengine audit`: trainings on several ranks in one process, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cli_run import Call

import ckptengine as ce

LENGTH = 90


Meddle = Callable[[ce.ElasticSampler, int], bool]


def train(
    run: Path, *, ranks: int, upto: int, meddle: Meddle = lambda sampler, step: False, **options: Any
) -> list[ce.ElasticSampler]:
    """Train on so many ranks, one after the other, to a step; save every 5 steps as ranks do together.

    `meddle` is called after each step and says whether the loop has to begin anew.
    """
    options = {"seed": 4, **options}
    samplers = [ce.ElasticSampler(LENGTH, 8, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    state = {"model": np.zeros(3), "data": Together(samplers)}
    with ce.Checkpointer(run, every=5) as ckpt:
        ckpt.restore(state)
        while samplers[0].global_batches < upto:
            for lists in zip(*(sampler.batches() for sampler in samplers), strict=True):
                assert all(lists)
                step = samplers[0].global_batches
                state["model"] += 1
                again = any([meddle(sampler, step) for sampler in samplers])
                ckpt.step(step, state)
                if again or step >= upto:
                    break
    return samplers


class Together:
    """The samplers of all ranks in one process: each one's digest counts, as if each rank had saved its own."""

    def __init__(self, samplers: list[ce.ElasticSampler]) -> None:
        self.samplers = samplers

    def state_dict(self) -> dict[str, Any]:
        states = [sampler.state_dict() for sampler in self.samplers]
        digests = [state["digest"].value for state in states]
        return {**states[0], "digest": ce.PerRank(states[0]["digest"].resize(digests, 0, 1))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for rank, sampler in enumerate(self.samplers):
            sampler.load_state_dict({**state, "digest": state["digest"] if rank == 0 else "0" * 32})


def report_of(call: Call, run: Path, code: int) -> dict[str, Any]:
    result = call("audit", run, "--json")
    assert result.exit_code == code, result.output
    document = json.loads(result.output)
    assert document["clean"] == (code == 0)
    return dict(document["report"])


def findings_of(call: Call, run: Path) -> list[tuple[str, list[int | None], str]]:
    return [(f["kind"], f["between"], f["message"]) for f in report_of(call, run, 1)["findings"]]


def moved(by: int) -> Meddle:
    """Move the cursor once, after step 17."""

    def meddle(sampler: ce.ElasticSampler, step: int) -> bool:
        if step != 17 or sampler in done:
            return False
        sampler._cursor.consumed += by
        done.append(sampler)
        return True

    done: list[ce.ElasticSampler] = []
    return meddle
