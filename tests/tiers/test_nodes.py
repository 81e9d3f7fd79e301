"""Two nodes of two ranks each, with disks and memory of their own: folders that only their ranks are told of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from committed_steps import steps_in as steps
from tiered import Running, finish
from waiting import until

from ckptengine.storage.local import LocalStorage
from ckptengine.tiers.memory import memory_root


def archives(folder: Path, step: int) -> set[str]:
    return {path.name for path in folder.glob(f"step-{step:08d}/data-*/rank-*.zarr.zip")}


def wait_until_home_has(run: Path, step: int) -> None:
    until(lambda: steps(run)[-1:] == [step], f"step {step} has come home")


def test_each_node_has_its_ranks_archives_and_a_manifest_and_home_has_all(tmp_path):
    run, local = tmp_path / "run", tmp_path / "local"
    reports = finish(4, tmp_path, run=str(run), local=str(local), node=2, until=3, keep_last={"local": 1, "run": 2})
    assert [report["uploaded"] for report in reports] == [3, None, None, None]
    for node, ranks in enumerate([(0, 1), (2, 3)]):
        assert steps(local / f"node-{node}") == [3]
        assert archives(local / f"node-{node}", 3) == {f"rank-{rank:05d}.zarr.zip" for rank in ranks}
    assert len(archives(run, 3)) == 4
    assert steps(run)[-1] == 3


@pytest.mark.parametrize("late", [2, 3], ids=["the rank that deletes", "the other rank"])
def test_a_node_keeps_what_it_uploads_late_until_then_and_no_longer(tmp_path, late):
    run, local = tmp_path / "run", tmp_path / "local"
    keep = {"local": 1, "run": 2}
    finish(4, tmp_path, run=str(run), local=str(local), node=2, until=3, keep_last=keep, late=[2, late])
    assert steps(run) == [2, 3], "step 2 was deleted before it was uploaded"
    assert [steps(local / f"node-{node}") for node in range(2)] == [[3], [3]]


def test_a_step_that_is_only_in_the_memory_of_both_nodes_is_completed_and_restored(tmp_path, memory):
    run = tmp_path / "run"
    places = {"run": str(run), "local": str(tmp_path / "local"), "memory": str(memory), "node": 2}
    with Running(4, tmp_path, **places, until=3, stuck=3) as job:
        job.wait_for(3)
        job.kill()
    assert 3 not in steps(run)
    assert [steps(memory_root(str(run), memory / f"node-{node}"))[-1] for node in range(2)] == [3, 3]
    assert [report["restored"] for report in finish(4, tmp_path, **places, until=3)] == [3] * 4
    assert steps(run)[-1] == 3


def test_a_step_of_which_a_node_has_lost_a_part_is_passed_over_for_the_one_before_it(tmp_path, memory):
    run = tmp_path / "run"
    places = {"run": str(run), "local": str(tmp_path / "local"), "memory": str(memory), "node": 2}
    with Running(4, tmp_path, **places, until=3, stuck=3) as job:
        job.wait_for(3)
        job.kill()
    (part,) = Path(memory_root(str(run), memory / "node-1")).glob("step-00000003/data-*/rank-00003.zarr.zip")
    part.unlink()
    assert [report["restored"] for report in finish(4, tmp_path, **places, until=4)] == [2] * 4
    assert steps(run)[-1] == 4


def test_an_image_that_was_damaged_in_one_nodes_memory_is_not_brought_home_and_the_disks_copy_is(tmp_path, memory):
    run, local = tmp_path / "run", tmp_path / "local"
    places = {"run": str(run), "local": str(local), "memory": str(memory), "node": 2}
    with Running(4, tmp_path, **places, until=2, wait_for=str(tmp_path / "never")) as job:
        job.wait_for(2)
        wait_until_home_has(run, 2)
        nodes = [LocalStorage(memory_root(str(run), memory / f"node-{node}")) for node in range(2)]
        until(lambda: all(steps(node)[-1:] == [2] for node in nodes), "the step is in memory too")
        job.kill()
    (part,) = Path(memory_root(str(run), memory / "node-1")).glob("step-00000002/data-*/rank-00002.zarr.zip")
    with part.open("r+b") as file:
        file.seek(200_000)
        file.write(b"\1" * 8)
    shutil.rmtree(run / "step-00000002")
    assert [report["restored"] for report in finish(4, tmp_path, **places, until=2)] == [2] * 4
    assert steps(run)[-1] == 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_is_replaced_by_an_empty_one_costs_what_had_not_come_home(tmp_path, memory, lost):
    run, local = tmp_path / "run", tmp_path / "local"
    places = {"run": str(run), "local": str(local), "memory": str(memory), "node": 2}
    with Running(4, tmp_path, **places, until=3, stuck=3) as job:
        job.wait_for(2)
        wait_until_home_has(run, 2)
        job.wait_for(3)
        job.kill()
    for folder in (local, memory):
        shutil.rmtree(folder / f"node-{lost}")
    reports = finish(4, tmp_path, **places, until=4)
    assert [report["restored"] for report in reports] == [2] * 4
    assert steps(run)[-1] == 4
    assert steps(local / f"node-{lost}")[-1] == 4
