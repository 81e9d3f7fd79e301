"""torchtitan's parts with this engine's manager, on four ranks that are killed and started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from forkserver import start_server
from jobs import run_job

JOB = Path(__file__).with_name("torchtitan_job.py")
RANKS = 4


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    start_server("torchtitan.components.dataloader,ckptengine.integrations.torchtitan,torch.distributed.pipelining")


def options_of(place: Path, **options: Any) -> dict[str, Any]:
    """Return a job's options, with its places."""
    place.mkdir(exist_ok=True)
    places = {"run": f"{place}/run", "log": f"{place}/log", "end": f"{place}/end", "killed": f"{place}/killed"}
    return places | options


def trained(place: Path) -> list[Any]:
    """Return what each rank noted: the samples and losses of its steps, and its end."""
    said = []
    for rank in range(RANKS):
        lines = [json.loads(line) for line in Path(f"{place}/log.{rank}").read_text().splitlines()]
        steps = {line[0]: line[1:] for line in lines}
        assert all(steps[line[0]] == line[1:] for line in lines)  # what was trained twice was the same both times
        said.append([steps, json.loads(Path(f"{place}/end.{rank}").read_text())])
    return said


@pytest.mark.parametrize("mesh", [[2, 2, 1], [2, 1, 2]], ids=["pp-fsdp2", "pp-tp"])
def test_ranks_that_are_killed_go_on(tmp_path: Path, mesh: list[int]) -> None:
    whole = options_of(tmp_path / "whole", mesh=mesh)
    assert run_job(JOB, whole, RANKS)[0] == {0}
    again = options_of(tmp_path / "again", mesh=mesh, kill=8, committed=6)
    assert run_job(JOB, again, RANKS)[0] == {-signal.SIGKILL}
    assert run_job(JOB, again, RANKS)[0] == {0}
    expected, found = trained(tmp_path / "whole"), trained(tmp_path / "again")
    assert [end.pop("start") for _, end in expected] == [0] * RANKS
    assert [end.pop("start") for _, end in found] == [6] * RANKS
    assert found == expected
    assert sorted(path.name for path in (tmp_path / "again/run/checkpoint").iterdir()) == ["step-6", "step-9"]


def test_another_parallel_layout_loads_it(tmp_path: Path) -> None:
    saved = options_of(tmp_path / "job", mesh=[2, 2, 1], steps=6)
    assert run_job(JOB, saved, RANKS)[0] == {0}
    stages = [end["digests"] for _, end in trained(tmp_path / "job")]
    other = saved | {"mesh": [1, 2, 2], "end": f"{tmp_path}/job/other"}
    assert run_job(JOB, other, RANKS)[0] == {0}
    for rank in range(RANKS):
        end = json.loads(Path(f"{other['end']}.{rank}").read_text())
        assert end["start"] == 6
        assert end["digests"] == stages[0] | stages[2]
    wider = saved | {"mesh": [1, 4, 1]}
    codes, text = run_job(JOB, wider, RANKS)
    assert codes == {1}
    assert "dataloader holds the position of 2 data-parallel ranks, here are 4" in text
    assert run_job(JOB, wider | {"config": {"exclude_from_loading": ["dataloader"]}}, RANKS)[0] == {0}


def test_nothing_of_a_checkpoint_is_a_pickle_and_torchs_own_is_read(tmp_path: Path) -> None:
    saved = options_of(tmp_path / "job", mesh=[1, 2, 2], steps=3, own=True)
    assert run_job(JOB, saved, RANKS)[0] == {0}
    ours = saved | {"own": False}
    codes, text = run_job(JOB, ours, RANKS)
    assert codes == {1}
    assert "torchtitan's own manager has pickled this position" in text
    assert run_job(JOB, ours | {"config": {"exclude_from_loading": ["dataloader"]}, "steps": 6}, RANKS)[0] == {0}
    for _, end in trained(tmp_path / "job"):
        assert end["start"] == 3
    for archive in Path(saved["run"]).glob("checkpoint/step-6/**/*.zip"):
        assert b"\x80\x04\x95" not in archive.read_bytes()  # how pickles of protocol 4 begin
