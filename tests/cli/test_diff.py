import json
from pathlib import Path

import numpy as np
import pytest
from cli_run import Call

import ckptengine as ce
from ckptengine.differences import diff


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints that differ in every way there is, and agree in one array and one value."""
    same = {"same": np.arange(300_000.0), "n": 5}
    first = {"w": np.zeros((3, 4), "f4"), "cast": np.ones(3, "f4"), "gone": np.ones(2), "v": 1, "old": 2}
    second = {"w": np.zeros((3, 4), "f4"), "cast": np.ones(3, "f8"), "new": np.ones(2), "v": 1.5, "fresh": None}
    second["w"][1, 2], second["w"][2, 0] = 0.25, np.nan
    for name, state in (("a", first), ("b", second)):
        ce.save(tmp_path / name, same | state)
    return tmp_path / "a", tmp_path / "b"


def test_every_kind_of_difference_is_shown_by_name(two: tuple[Path, Path], call: Call) -> None:
    result = call("diff", *two, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert {(one["name"], one["kind"]): one["text"] for one in found["differences"]} == {
        ("w", "contents"): "2 of 12 elements differ, by 0.25 at most",
        ("cast", "head"): "float32 (3,) and float64 (3,)",
        ("gone", "only in the first"): "float64 (2,)",
        ("new", "only in the second"): "float64 (2,)",
        ("old", "only in the first"): "2",
        ("fresh", "only in the second"): "None",
        ("v", "value"): "1 and 1.5",
    }
    assert (found["same_arrays"], found["same_values"]) == (1, 1)
    text = call("diff", *two).stdout
    assert "7 names differ; 1 arrays and 1 plain values are the same" in text


def test_a_checkpoint_is_the_same_as_itself_and_as_its_export(
    two: tuple[Path, Path], tmp_path: Path, call: Call
) -> None:
    assert call("diff", two[0], two[0]).exit_code == 0
    for to, name in (("torch", "c.pt"), ("dcp", "d")):
        ce.export(two[0], tmp_path / name, to=to)
        result = call("diff", two[0], tmp_path / name)
        assert result.exit_code == 0, result.stdout
    ce.export(two[0], tmp_path / "hf")
    assert call("diff", two[0], tmp_path / "hf", "--only", "same", "--only", "w").exit_code == 0


def test_heads_alone_and_parts_and_new_names_are_compared(two: tuple[Path, Path], call: Call) -> None:
    assert call("diff", *two, "--heads", "--only", "w").exit_code == 0
    assert call("diff", *two, "--only", "w").exit_code == 1
    assert call("diff", *two, "--only", "new", "--rename", "gone=new").exit_code == 0
    assert call("diff", *two, "--only", "wrong").exit_code == 2
    assert call("diff", two[0], two[1] / "none").exit_code == 2


def test_large_arrays_are_compared_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptengine.differences._WINDOW_NBYTES", 1000)
    array = np.arange(10_000.0).reshape(100, 100)
    ce.save(tmp_path / "a", {"w": array})
    array[[3, 50, 99], [7, 0, 99]] += [1, 2, 3]
    ce.save(tmp_path / "b", {"w": array})
    seen: list[tuple[int, int]] = []
    found = diff(tmp_path / "a", tmp_path / "b", progress=lambda done, total: seen.append((done, total)))
    assert [one.text for one in found.differences] == ["3 of 10,000 elements differ, by 3 at most"]
    assert seen[-1] == (80_000, 80_000)
