"""Runs on each store: saves, restores, retention, tiers, and what is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import ckptengine as ce
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.listing import committed
from ckptengine.catalog.retention import remove_leftovers
from ckptengine.errors import CheckpointDamagedError
from ckptengine.storage.open import open_storage

HERE = Path(__file__).parent


def state(step: int, place) -> dict:
    # More than one part where an upload has parts; what an SFTP server in Python moves in a second elsewhere.
    numbers = 100_000 if place.url.startswith(("sftp", "ssh")) else 2_200_000
    return {"w": np.random.default_rng(step).standard_normal(numbers), "small": np.arange(7), "step": step}


def train(place, steps: range, **more) -> None:
    with ce.Checkpointer(place.url, every=1, storage_options=place.options, on_error="raise", **more) as ckpt:
        filled = state(0, place)
        start = ckpt.restore(filled) or 0
        assert filled["step"] == start
        for step in steps:
            ckpt.step(step, state(step, place))


def everything(place) -> list[str]:
    return sorted(place.storage()._below(""))


def test_a_run_is_saved_restored_and_keeps_what_it_is_told_to(place):
    train(place, range(1, 4), keep_last=2)
    train(place, range(4, 6), keep_last=2)
    storage = open_storage(place.url, place.options)
    assert [entry.step for entry in committed(storage)] == [4, 5]
    assert [name for name in storage.list() if name.startswith("step-")] == ["step-00000004", "step-00000005"]
    assert len([name for name in everything(place) if "/rank-" in name]) == 2
    found = ce.load(place.url, storage_options=place.options)
    assert found["step"] == 5
    assert (found["w"] == state(5, place)["w"]).all()


def test_a_single_checkpoint_is_replaced_and_loaded(place):
    for step in (1, 2):
        ce.save(place.url, state(step, place), storage_options=place.options)
    found = ce.load(place.url, storage_options=place.options)
    assert (found["w"] == state(2, place)["w"]).all()
    assert len([name for name in everything(place) if "rank-" in name]) == 1


def test_a_local_tier_brings_its_checkpoints_home_and_an_empty_machine_starts_from_there(place, tmp_path):
    train(place, range(1, 4), keep_last=1, local=tmp_path / "first")
    storage = open_storage(place.url, place.options)
    assert [entry.step for entry in committed(storage)] == [3]
    train(place, range(4, 5), keep_last=1, local=tmp_path / "second")
    assert [entry.step for entry in committed(storage)] == [4]


def test_what_a_dead_writer_has_left_is_swept(place):
    storage, dead = place.storage(), "step-00000001/data-0123456789ab-1"
    command = [sys.executable, str(HERE / "dead_writer.py"), place.url, json.dumps(dict(place.options)), dead]
    assert subprocess.run(command, timeout=100).returncode == -signal.SIGKILL
    storage.write_bytes(f"{dead}/layout.zarr.zip", b"1")
    storage.write_bytes("step-00000001/mine.txt", b"mine")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("lease", "retention"):
            patch.setattr(f"ckptengine.catalog.{module}.LEASE_SECONDS", 0.0)
        time.sleep(2)  # some tell whole seconds
        assert remove_leftovers(storage) == []
    assert storage.list("step-00000001") == ["mine.txt"]
    assert storage.unfinished() == []


def test_damage_in_the_store_is_found(place):
    ce.save(place.url, state(1, place), storage_options=place.options)
    storage = place.storage()
    name = next(name for name in everything(place) if "rank-" in name)
    data = bytearray(storage.read_range(name, 0, storage.size(name)))
    data[len(data) // 2] ^= 1
    storage.write_bytes(name, data)
    with pytest.raises(CheckpointDamagedError, match="rank-00000"):
        ce.load(place.url, storage_options=place.options)


def test_a_store_that_can_decide_gives_each_life_a_generation_of_its_own_and_another_tells_the_rule(place, caplog):
    storage = place.storage()
    storage.create()
    if not place.decides:
        assert "let only one job at a time write to this run" in caplog.text
        return
    claimed: list[int] = []
    threads = [threading.Thread(target=lambda: claimed.append(claim_generation(storage, None))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 7))
