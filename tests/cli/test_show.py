import json
from pathlib import Path

import numpy as np
import pytest
from cli_run import Call

import ckptengine as ce


def test_leaves_are_shown_with_dtype_shape_size_and_placement(run: Path, call: Call) -> None:
    result = call("show", run / "step-00000020")
    assert result.exit_code == 0
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert lines["model.weight"][1:] == ["float32", "600", "×", "100", "234", "KiB", "replicated", "0"]
    assert lines["model.empty"][1:5] == ["int16", "0", "×", "3"]


def test_plain_values_are_shown(run: Path, call: Call) -> None:
    text = call("show", run / "step-00000020").stdout
    for expected in ("settings.rate", "0.125", "inf", "1020"):
        assert expected in text


def test_of_a_run_the_newest_is_shown(run: Path, call: Call) -> None:
    assert json.loads(call("show", run, "--json").stdout)["step"] == 30


@pytest.mark.parametrize("name", ["step-20", "step-00000020", "step-20/"])
def test_a_step_may_be_short_of_zeros(run: Path, call: Call, name: str) -> None:
    assert json.loads(call("show", f"{run}/{name}", "--json").stdout)["step"] == 20


def test_only_what_matches_a_pattern_is_shown(run: Path, call: Call) -> None:
    shown = json.loads(call("show", run, "--only", "model.w*", "--only", "settings.rate", "--json").stdout)
    assert [leaf["name"] for leaf in shown["leaves"]] == ["model.weight"]
    assert list(shown["values"]) == ["settings.rate"]


def test_a_pattern_that_matches_nothing_is_wrong_usage(run: Path, call: Call) -> None:
    result = call("show", run, "--only", "modle.*")
    assert result.exit_code == 2
    assert "no leaf has a name like modle.*" in result.stderr


def test_names_and_dates_are_whole_in_80_columns(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptengine.cli.output._PIPE_WIDTH", 80)
    assert "model.weight " in call("show", run).stdout
    created = json.loads(call("ls", run, "--json").stdout)[0]["created"]
    assert created[:16].replace("T", " ") in call("ls", run).stdout


def test_json_holds_every_leaf(run: Path, call: Call) -> None:
    shown = json.loads(call("show", run, "--json").stdout)
    leaves = {leaf["name"]: leaf for leaf in shown["leaves"]}
    assert leaves["model.weight"] == {
        "name": "model.weight",
        "dtype": "float32",
        "shape": [600, 100],
        "nbytes": 240000,
        "placement": "replicated",
        "archives": [0],
        "rank": None,
    }
    assert leaves["model.bias"]["nbytes"] == 800
    assert leaves["model.empty"]["nbytes"] == 0
    assert shown["world_size"] == 1


def test_a_single_checkpoint_is_shown_too(tmp_path: Path, call: Call) -> None:
    ce.save(str(tmp_path / "one"), {"w": np.ones(5, "f2")}, metadata={"note": "hello"})
    result = call("show", tmp_path / "one")
    assert result.exit_code == 0
    assert "float16" in result.stdout
    assert "hello" in result.stdout


def test_a_step_that_is_not_there_is_an_error_of_its_own(run: Path, call: Call) -> None:
    result = call("show", run / "step-25")
    assert result.exit_code == 2
    assert "step-00000025" in result.stderr


def test_a_damaged_layout_is_an_error_that_names_it(run: Path, call: Call) -> None:
    (layout,) = run.glob("step-00000030/data-*/layout.zarr.zip")
    data = bytearray(layout.read_bytes())
    data[len(data) // 2] ^= 1
    layout.write_bytes(data)
    result = call("show", run / "step-30")
    assert result.exit_code == 1
    assert "layout.zarr.zip" in result.stderr


def test_names_cannot_make_the_terminal_do_anything(tmp_path: Path, call: Call) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\u202eabc"
    ce.save(tmp_path, {evil: np.zeros(3), "values": {evil: 1}}, metadata={evil: evil})
    for options in ((), ("--json",)):
        text = call("show", tmp_path, *options).stdout
        assert all(one.isprintable() or one == "\n" for one in text)
        assert "\\u001b]0;owned\\u0007\\u009b31m\\u202eabc" in text
    assert json.loads(call("show", tmp_path, "--json").stdout)["metadata"] == {evil: evil}
    with next(tmp_path.glob("data-*/rank-00000.zarr.zip")).open("r+b") as file:
        file.write(b"damage" * 1000)
    damaged = call("verify", tmp_path)
    assert damaged.exit_code == 1
    assert all(one.isprintable() or one == "\n" for one in damaged.output)
