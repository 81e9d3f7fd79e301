"""The command writes its JSON, cleans up, reports what fails, and never waits for ever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.processes import ROOT, fresh


def test_peers_writes_figures_and_targets(tmp_path: Path) -> None:
    file, folder = tmp_path / "figures.json", tmp_path / "disk"
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks", "peers", "--scale", "0.1", "--runs", "1", "--only", "safetensors"]
    command += ["--folder", str(folder), "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(file.read_text())
    assert list(folder.iterdir()) == []
    assert set(result["machine"]) >= {"cpu", "cores", "kernel", "file_system", "versions"}
    systems = result["peers"]["systems"]
    assert list(systems) == ["limit: memcpy, O_DIRECT", "ckptengine", "safetensors"]
    assert all(len(one[measure]) == 1 for one in systems.values() for measure in ("stall", "durable", "load"))
    assert len(result["peers"]["targets"]) == 5
    assert "not measured" in done.stdout  # of the peers that were left out

    pictures = plots.draw(result, tmp_path / "plots")
    assert [picture.name for picture in pictures] == ["benchmarks-peers.svg", "benchmarks-timeline.svg"]
    assert all(picture.stat().st_size < 100_000 for picture in pictures)


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="more than 0.3 s"):
        fresh("benchmarks.memory", {}, tmp_path, timeout=0.3)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No module named benchmarks.absent"):
        fresh("benchmarks.absent", {}, tmp_path, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_the_timeline_shows_the_phases_that_a_save_reported() -> None:
    stats = {"phases": [{"name": "copy", "began": 0.5, "ended": 1.0}]}
    assert plots.phases(stats) == [("copy", 0.5, 1.0)]
