"""Exports that a training makes of its own checkpoints."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import ckptengine as ce

STATE = {"model": {"w": np.arange(1000.0), "b": np.ones(3, np.float32)}, "optimizer": {"m": np.zeros(5)}}
MODEL = {"only": ["model"], "rename": {"model": ""}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_so_many_steps_the_weights_are_exported_and_saved_though_nothing_else_is_due(tmp_path: Path) -> None:
    export = ce.Export(tmp_path / "hub" / "step-{step:04d}", dtype="float32", **MODEL)
    with ce.Checkpointer(tmp_path / "run", every=5, export_every=2, export=export) as ckpt:
        for step in range(1, 7):
            ckpt.step(step, STATE)
    assert names(tmp_path / "hub") == ["step-0002", "step-0004", "step-0006"]
    assert sorted(int(name[5:]) for name in names(tmp_path / "run") if name.startswith("step-")) == [2, 4, 5, 6]
    written = safetensors.numpy.load_file(tmp_path / "hub" / "step-0004" / "model.safetensors")
    assert written.keys() == {"w", "b"}
    assert np.array_equal(written["w"], STATE["model"]["w"].astype(np.float32))


def test_with_a_local_tier_it_is_exported_once_from_the_persistent_one(tmp_path: Path) -> None:
    export = ce.Export(tmp_path / "hub" / "{step}", **MODEL)
    with ce.Checkpointer(
        tmp_path / "run", local=tmp_path / "local", on_error="raise", export_every=1, export=export
    ) as ckpt:
        for step in (1, 2):
            ckpt.step(step, STATE)
            ckpt.flush()
    assert names(tmp_path / "hub") == ["1", "2"]


def test_an_export_that_fails_is_logged_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hub" / "1").mkdir(parents=True)
    (tmp_path / "hub" / "1" / "model.safetensors").write_bytes(b"somebody else's")
    export = ce.Export(tmp_path / "hub" / "{step}", **MODEL)
    with ce.Checkpointer(tmp_path / "run", on_error="raise", export_every=1, export=export) as ckpt:
        for step in (1, 2):
            ckpt.step(step, STATE)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "step-00000001: export_every failed; the checkpoint is not affected" in told[0]
    assert "model.safetensors exists already" in told[0]
    assert (tmp_path / "hub" / "1" / "model.safetensors").read_bytes() == b"somebody else's"
    assert (tmp_path / "hub" / "2" / "model.safetensors").exists()


TRAINING = """
import sys, time
import numpy as np
import ckptengine as ce
from ckptengine.export import run

def writing(plan, *rest, write=run.write_file):
    written = write(plan, *rest)
    if sys.argv[2] == "cut" and plan.name.startswith("model-00002"):
        print("cut", flush=True)
        time.sleep(600)
    return written

run.write_file = writing
state = {f"w{number}": np.full(1000, float(number)) for number in range(4)}
export = ce.Export(sys.argv[1] + "/hub/{step}", max_shard_size=8000)
with ce.Checkpointer(sys.argv[1] + "/run", every=1, export_every=2, export=export) as ckpt:
    start = ckpt.restore(state) or 0
    for step in range(start + 1, 3):
        ckpt.step(step, state)
"""


def test_an_export_that_a_kill_cut_off_is_made_up_for_after_the_restart(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    with subprocess.Popen([*command, "cut"], stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "cut\n"
        training.kill()
    cut = tmp_path / "hub" / "2"
    assert names(cut) == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    subprocess.run([*command, "whole"], check=True, timeout=120)
    assert {name: float(array[0]) for name, array in ce.load(cut).items()} == {f"w{n}": float(n) for n in range(4)}
    written = (cut / "model.safetensors.index.json").stat().st_mtime_ns
    again = subprocess.run([*command, "whole"], check=True, timeout=120, capture_output=True, text=True)
    assert (cut / "model.safetensors.index.json").stat().st_mtime_ns == written
    assert "already" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"export_every": 5}, r"export=None: give a ckptengine.Export"),
        ({"export": ce.Export("hub/{step}")}, r"export= without export_every=: give a number of steps"),
        ({"export_every": 0, "export": ce.Export("hub/{step}")}, r"export_every=0: give a number of steps"),
        ({"export_every": 5, "export": "hub/{step}"}, r"export='hub/\{step\}': give a ckptengine.Export"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, arguments: dict[str, object], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        ce.Checkpointer(tmp_path / "run", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"target": "hub"}, r"target='hub': put \{step\} into it"),
        ({"target": "hub/{epoch}"}, r"target='hub/\{epoch\}': \{step\} is the only placeholder"),
        ({"target": "hub/{step}", "to": "gguf"}, r"to='gguf': one of safetensors"),
        ({"target": "hub/{step}", "max_shard_size": "5 apples"}, r"max_shard_size='5 apples'"),
    ],
)
def test_an_export_that_makes_no_sense_is_refused_when_it_is_made(arguments: dict[str, str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ce.Export(**arguments)


AGAIN = """
import os, sys
import numpy as np
import ckptengine as ce

ckpt = ce.Checkpointer(sys.argv[1] + "/run", local=sys.argv[1] + "/local", every=1, upload_bytes_per_second=1)
assert ckpt.restore({"w": np.zeros(3)}, step=1) == 1
ckpt.save(2, {"w": np.full(3, 99.0)}).durable.result()
os._exit(0)
"""


def test_a_step_that_was_trained_again_is_exported_as_it_was_restored_and_not_as_it_was_before(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path / "run", every=1) as ckpt:
        for step in (1, 2):
            ckpt.step(step, {"w": np.full(3, float(step))})
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path)], check=True, timeout=100)
    state, export = {"w": np.zeros(3)}, ce.Export(tmp_path / "hub" / "{step}")
    with ce.Checkpointer(tmp_path / "run", local=tmp_path / "local", every=1, export_every=1, export=export) as ckpt:
        assert ckpt.restore(state) == 2
        assert state["w"][0] == 99
    assert ce.load(tmp_path / "hub" / "2")["w"][0] == 99
