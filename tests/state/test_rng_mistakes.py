"""What can not be restored of random streams is told, and nothing is set."""

import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from state_memory import load, save
from streams import snapshot

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, FormatVersionError, LoadMismatchError
from ckptengine.state.random_record import Record, digest_of

pytestmark = pytest.mark.usefixtures("streams_as_they_were")


def test_a_job_without_torch_is_resumed_by_one_with_torch(tmp_path, caplog):
    program = "import sys, random, ckptengine as ce; random.seed(5); ce.save(sys.argv[1], {'rng': ce.RNG()})"
    program += "; assert 'torch' not in sys.modules; print(random.random())"
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "point"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(ce.__file__).parents[1],
    )
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ce.load(tmp_path / "point", into={"rng": ce.RNG()})
        states.append(torch.get_rng_state().tolist())
        assert random.random() == float(run.stdout)
    assert states[0] == states[1], "whatever it was before"
    assert caplog.text.count("in this process, but not saved, so seeded anew: torch.cpu") == 2


def test_a_generator_that_is_given_no_longer_or_for_the_first_time_is_told(caplog):
    stored = save({"rng": ce.RNG({"old": random.Random(1)})})
    new = random.Random(2)
    load(stored, {"rng": ce.RNG({"new": new})})
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "RNG, rank 0: saved, but not in this process, so ignored: old" in caplog.text
    assert "RNG, rank 0: in this process, but not saved, so seeded anew: new" in caplog.text
    assert new.random() != random.Random(2).random()


def changed(state, name, position=None):
    """Return a state in which one byte of a stream is another one, or its array is too short."""
    arrays = state["states"].value
    arrays[name] = arrays[name][:-1].copy() if position is None else arrays[name].copy()
    if position is not None:
        arrays[name][position] ^= 1
    return state


@pytest.mark.parametrize("name", ["python", "numpy", "torch.cpu"])
@pytest.mark.parametrize("position", [None, 0, -1])
def test_a_damaged_state_is_named_and_nothing_is_set(name, position):
    rng = ce.RNG()
    state = changed(rng.state_dict(), name, position)
    random.random(), np.random.random(), torch.rand(1)
    before = snapshot()
    with pytest.raises(CheckpointDamagedError, match=f"RNG: the state of '{name}' is not the one that was saved"):
        rng.load_state_dict(state)
    assert snapshot() == before


@pytest.mark.parametrize("name", ["python", "numpy", "torch.cpu", "philox"])
def test_a_state_that_was_made_up_is_refused_and_nothing_is_set(name):
    rng = ce.RNG({"philox": np.random.Generator(np.random.Philox(1))})
    state = rng.state_dict()
    stream = rng._streams()[name]
    for made in (np.full_like(state["states"].value[name], 255), np.zeros(7, np.uint8)):
        state["states"].value[name] = made
        record = Record.of_value(state["record"].value)
        record.streams[name] = (stream.kind, digest_of(stream.kind, made))
        state["record"].value = record.as_value()
        before = snapshot()
        with pytest.raises(CheckpointDamagedError, match=f"the state of '{name}' can't be set"):
            rng.load_state_dict(state)
        assert snapshot() == before


def test_a_state_of_something_else_is_refused():
    rng = ce.RNG()
    for foreign in ({}, {"step": 3}, {**rng.state_dict(), "record": 5}, {**rng.state_dict(), "version": "1"}):
        with pytest.raises(LoadMismatchError, match="this is not the state of an RNG"):
            rng.load_state_dict(foreign)
    with pytest.raises(FormatVersionError, match="version 2 is newer"):
        rng.load_state_dict({**rng.state_dict(), "version": 2})
    with pytest.raises(LoadMismatchError, match="missing in the checkpoint:\n  rng\n"):
        load(save({"a": 1}), {"a": 1, "rng": ce.RNG()})


def test_another_kind_of_generator_under_the_same_name_is_refused():
    stored = save({"rng": ce.RNG({"x": np.random.default_rng(1)})})
    before = snapshot()
    with pytest.raises(LoadMismatchError, match="'x' was saved from numpy's Generator of PCG64, and is torch's Gener"):
        load(stored, {"rng": ce.RNG({"x": torch.Generator()})})
    assert snapshot() == before


def test_impossible_arguments_are_refused():
    for name in ("python", "torch.cpu", "a/b", "", 3):
        with pytest.raises(ValueError, match="can't be called"):
            ce.RNG({name: random.Random(1)})
    for thing in (random.SystemRandom(), 5, np.random):
        with pytest.raises(TypeError, match="'x' is .*; pass a random"):
            ce.RNG({"x": thing})
    with pytest.raises(ValueError, match="shared='nunpy': there is no such stream; there are python, numpy"):
        ce.RNG(shared=["nunpy"])
    with pytest.raises(TypeError, match="one string"):
        ce.RNG(shared="numpy")
    with pytest.raises(TypeError):
        ce.RNG(key="a")
    with pytest.raises(ValueError, match="pass `resize` too"):
        ce.PerRank(1, ranks=lambda saved, rank, world_size: [0])
