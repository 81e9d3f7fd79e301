"""Lightning's Fabric: its wrapped model, optimizer and loader in the state, and its own calls through the plugin."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from forkserver import start_server
from jobs import run_job

JOB = Path(__file__).with_name("fabric_job.py")


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    start_server("lightning.fabric,ckptengine.integrations.lightning")


def noted(place: Path, ranks: int) -> list[Any]:
    """Return per rank the losses of its steps, and its end."""
    said = []
    for rank in range(ranks):
        lines = [json.loads(line) for line in (place / f"log.{rank}").read_text().splitlines()]
        losses = dict(lines)
        assert all(losses[step] == loss for step, loss in lines)  # what was trained twice was the same both times
        said.append([losses, *json.loads((place / f"end.{rank}").read_text())])
    return said


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0)])
def test_a_loop_with_wrapped_objects_goes_on_and_fabrics_own_calls_work(
    tmp_path: Path, ranks: int, workers: int
) -> None:
    ends = []
    for name, kills in (("whole", 0), ("again", 1)):
        place = tmp_path / name
        place.mkdir()
        options = {"run": f"{place}/run", "log": f"{place}/log", "end": f"{place}/end", "killed": f"{place}/killed",
                   "ranks": ranks, "workers": workers}  # fmt: skip
        if kills:
            options |= {"kill": 8, "committed": 6}
            assert run_job(JOB, options, ranks)[0] == {-signal.SIGKILL}
        assert run_job(JOB, options, ranks)[0] == {0}
        ends.append(noted(place, ranks))
    whole, again = ends
    assert [one.pop(1) for one in whole] == [None] * ranks
    assert [one.pop(1) for one in again] == [6] * ranks
    assert again == whole
