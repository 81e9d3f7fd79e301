"""Real processes on one node that load the same checkpoint together."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forkserver import fork

HERE = Path(__file__).parent
BLOCK = 65536
Job = Callable[..., list[dict[str, Any] | None]]
_numbers = itertools.count()


def run_job(folder: Path, size: int, layout: str, scenario: str = "") -> list[dict[str, Any] | None]:
    """Run one process per rank; return what each found, None for one that could not say."""
    attempt = f"{layout}-{next(_numbers)}"
    command = [str(HERE / "sharing_job.py"), str(folder)]
    ranks = [fork([*command, str(rank), str(size), attempt, layout, scenario]) for rank in range(size)]
    victim = int(scenario.partition(":")[2]) if scenario.startswith(("kill", "hang")) else None
    try:
        for rank, process in enumerate(ranks):
            if rank != victim:
                assert process.wait(120) == 0
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    paths = [folder / f"{attempt}-{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return the folder of a checkpoint saved as rows by so many ranks; each is saved once."""
    folders: dict[int, Path] = {}

    def folder(size: int) -> Path:
        if size not in folders:
            folders[size] = tmp_path_factory.mktemp(f"rows-{size}")
            run_job(folders[size], size, "rows", "save")
        return folders[size]

    return folder


def read_over_needed(found: list[Any]) -> float:
    """Return the bytes that the ranks asked the storage for, over those of all blocks that any of them needs."""
    union = {
        (archive, block)
        for one in found
        for archive, start, stop in one["needs"]
        for block in range(start, stop, BLOCK)
    }
    assert union
    return sum(one["asked"] for one in found) / (len(union) * BLOCK)


@pytest.mark.parametrize(
    ("savers", "loaders", "layout"),
    [(4, 4, "columns"), (4, 4, "replicas"), (4, 2, "rows"), (2, 3, "rows"), (4, 4, "rows")],
    ids=["rows to columns", "replicas", "FSDP 4 to 2", "FSDP 2 to 3", "unchanged"],
)
def test_each_byte_is_read_once_per_node_and_arrives(saved, savers, loaders, layout):
    found = run_job(saved(savers), loaders, layout)
    for one in found:
        assert one["kind"] == "", one["text"]
        assert one["same"]
        assert one["growth"] <= 256 << 20
        assert one["counts"][0] == one["asked"]
        assert one["counts"][2] == found[0]["counts"][2]
        assert one["shared"] == []
        assert one["mapped"] == 0
        assert one["messages"] == []
    assert read_over_needed(found) <= 1.05
    assert sum(one["counts"][0] for one in found) == found[0]["counts"][2]


def test_a_load_much_larger_than_the_window_uses_it_over_and_over_and_no_more_memory(saved):
    found = run_job(saved(4), 4, "replicas", "two-slots")
    assert read_over_needed(found) <= 1.05
    for one in found:
        assert one["same"]
        # 64 MiB are loaded, through a window of 8 MiB and buffers of 3 requests.
        assert one["growth"] <= 40 << 20


def test_ranks_on_different_nodes_read_for_themselves(saved):
    for one in run_job(saved(4), 4, "columns", "strangers"):
        assert one["same"]
        assert one["counts"][0] == one["counts"][1] == one["asked"]
        assert one["messages"] == []


@pytest.mark.parametrize(("scenario", "first"), [("pairs", 2), ("odd-one", 3)])
def test_each_node_reads_once(saved, scenario, first):
    found = run_job(saved(4), 4, "replicas", scenario)
    assert all(one["same"] and one["messages"] == [] for one in found)
    for node in (found[:first], found[first:]):
        assert read_over_needed(node) <= 1.05


def test_a_node_short_of_memory_takes_a_smaller_window(saved):
    found = run_job(saved(4), 4, "columns", f"memory:{20 << 20}")
    assert all(one["same"] and one["messages"] == [] for one in found)
    assert read_over_needed(found) <= 1.05


def test_a_node_without_memory_to_share_reads_privately_and_says_so_once(saved):
    found = run_job(saved(4), 4, "columns", "memory:0")
    for one in found:
        assert one["same"]
        assert one["asked"] == one["counts"][1]
        (message,) = one["messages"]
        assert "can't share memory" in message
        assert "rank 0: [Errno 28]" in message


def test_a_flipped_byte_is_reported_on_all_ranks_with_file_and_place(saved, tmp_path):
    folder = tmp_path / "damaged"
    run_job(folder, 4, "rows", "save")
    (archive,) = folder.glob("run/data-*/rank-00002.zarr.zip")
    position = 9 << 20
    with archive.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    start = position // BLOCK * BLOCK
    found = run_job(folder, 4, "columns")
    for one in found:
        assert one["kind"] == "CheckpointDamagedError", one["text"]
        assert str(archive) in one["text"]
        assert f"bytes {start} to {start + BLOCK}" in one["text"]
        assert one["seconds"] < 4, "the others stop at once, not at the deadline"


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("how", ["kill", "hang"])
def test_a_rank_that_is_killed_or_hangs_in_a_shared_read_is_named_on_the_others(saved, how, victim):
    found = run_job(saved(4), 4, "replicas", f"{how}:{victim}")
    assert found[victim] is None
    for rank, one in enumerate(found):
        if rank == victim:
            continue
        assert one["kind"] == "DeadlineError", one["text"]
        assert f"rank {victim} did" in one["text"] or f"rank {victim} ended" in one["text"]
        # One deadline to see that it hangs, and one of the exchange in which all ranks tell how they fared.
        assert one["seconds"] < (4 + 2) * (1 if how == "kill" else 2) + 4
        assert one["shared"] == []
    assert not [name for name in os.listdir("/dev/shm") if "ckptengine-load" in name]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_shared_read_that_the_storage_never_answers_ends_on_the_rank_that_reads_and_names_the_file(saved, victim):
    found = run_job(saved(2), 2, "replicas", f"stall:{victim}")
    reader, other = found[victim], found[1 - victim]
    assert reader["kind"] == other["kind"] == "DeadlineError"
    hung = r"reading .*/run/.*rank-0000\d.zarr.zip has not ended after 4 s; the storage does not answer"
    assert re.search(hung, reader["text"])
    # What it raises is what it found itself, or has heard of all in the exchange that follows.
    assert f"rank {victim} did not come forward" in other["text"] or re.search(hung, other["text"])
