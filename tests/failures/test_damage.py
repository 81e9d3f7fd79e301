"""Bytes change on the disk: whatever is loaded is right, or an error says what is wrong."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from trained import same

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError
from ckptengine.inspect import verify

CASES = 1200


def state() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {
        "model": {
            "large": rng.integers(0, 256, (300, 500), np.uint8),
            "weights": rng.standard_normal((40, 33)).astype(np.float32),
            "half": np.arange(60).astype(ml_dtypes.bfloat16).reshape(3, 4, 5),
            "empty": np.zeros((0, 4)),
            "scalar": np.array(3.5),
        },
        "values": {"step": 12, "names": ["a", ("b", None)], "big": 2**80, "nan": float("inf"), "raw": b"\x00\xff"},
        "own": ce.PerRank({"seed": 4, "cursor": np.arange(9)}),
    }


def expected() -> dict[str, Any]:
    whole = state()
    del whole["own"]
    return whole


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("original") / "point"
    ce.save(place, state(), metadata={"note": "as it was"})
    return place


def blank() -> dict[str, Any]:
    empty = state()
    for array in empty["model"].values():
        array[...] = 0
    empty["own"].value["cursor"][:] = 0
    return empty


def flip(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def zero(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.choice([1, 16, 4096, 70_000]))
    data[start:stop] = bytes(stop - start)


def noise(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.choice([1, 2, 8, 512]))
    data[start:stop] = chance.randbytes(stop - start)


def cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data)) :]


def lengthen(chance: random.Random, data: bytearray) -> None:
    data += chance.randbytes(chance.choice([1, 4096]))


def remove(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.choice([1, 8, 4096])]


def swap(chance: random.Random, data: bytearray) -> None:
    size = min(chance.choice([1, 8, 512, 4096, 65_536]), max(1, len(data) // 2))
    first, second = (chance.randrange(len(data) - size + 1) // size * size for _ in range(2))
    a, b = bytes(data[first : first + size]), bytes(data[second : second + size])
    data[first : first + size], data[second : second + size] = b, a


DAMAGES: list[Callable[[random.Random, bytearray], None]] = [flip, flip, zero, noise, cut, lengthen, remove, swap]


@pytest.mark.parametrize("part", range(4))
def test_any_damage_anywhere_is_an_error_or_harmless(original: Path, folder: Path, part: int) -> None:
    chance = random.Random(part)
    place = folder / "point"
    shutil.copytree(original, place)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    assert len(files) == 3
    refused = harmless = 0
    for case in range(CASES // 4):
        file = files[case % len(files)]
        whole = file.read_bytes()
        data = bytearray(whole)
        damage = chance.choice(DAMAGES)
        damage(chance, data)
        file.write_bytes(data)
        what = f"case {case} of part {part}: {damage.__name__} in {file.name}"
        for load in (lambda: ce.load(place), lambda: loaded_into(place)):
            try:
                found = load()
            except CheckpointError as error:
                refused += 1
                assert str(place) in str(error), (what, error)  # noqa: PT017 - harmless damage raises nothing
            else:
                harmless += 1
                assert same(found, expected()), what
        # Other white space in a manifest is the same manifest.
        if bytes(data).strip() != whole:
            assert damaged(place), f"{what}: verify found nothing"
        file.write_bytes(whole)
    assert same(ce.load(place), expected())
    assert refused > harmless


def loaded_into(place: Path) -> dict[str, Any]:
    target = blank()
    ce.load(place, into=target)
    own = target.pop("own").value
    assert same(own, state()["own"].value)
    return target


def damaged(place: Path) -> bool:
    try:
        return bool(verify(place))
    except CheckpointError:
        return True


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "pipe", "loop"])
@pytest.mark.parametrize("number", range(3))
def test_a_file_that_is_none_is_named(original: Path, tmp_path: Path, kind: str, number: int) -> None:
    place = tmp_path / "point"
    shutil.copytree(original, place)
    file = sorted(path for path in place.rglob("*") if path.is_file())[number]
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "empty":
        file.touch()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file)
    with pytest.raises(CheckpointError, match=str(place)):
        ce.load(place)


def test_files_of_two_checkpoints_are_not_mixed(original: Path, tmp_path: Path) -> None:
    place, other = tmp_path / "point", tmp_path / "other"
    shutil.copytree(original, place)
    changed = state()
    changed["model"]["large"][0, 0] ^= 1
    ce.save(other, changed)
    theirs = next(other.glob("data-*"))
    for name in ("rank-00000.zarr.zip", "layout.zarr.zip"):
        mine = next(place.glob("data-*")) / name
        whole = mine.read_bytes()
        mine.write_bytes((theirs / name).read_bytes())
        try:
            assert same(ce.load(place), expected())
        except CheckpointDamagedError as error:
            assert name in str(error)  # noqa: PT017 - one of the two files may be the same in both
        mine.write_bytes(whole)


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_taken(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ce.Checkpointer(folder / "run") as checkpointer:
        for step in (10, 20):
            current = state()
            current["values"]["step"] = step
            checkpointer.save(step, current)
    whole = {path: path.read_bytes() for path in (folder / "run" / "step-00000020").rglob("*") if path.is_file()}
    for path, data in whole.items():
        for change in (data[:-1], b"", bytes([data[0] ^ 1]) + data[1:]):
            path.write_bytes(change)
            caplog.clear()
            target = blank()
            with ce.Checkpointer(folder / "run") as checkpointer:
                assert checkpointer.restore(target) == 10
            assert target["values"]["step"] == 10
            assert same(target["model"], state()["model"])
            assert path.name in caplog.text
        path.write_bytes(data)
    with ce.Checkpointer(folder / "run") as checkpointer:
        assert checkpointer.restore(blank()) == 20
    for step in (10, 20):
        shutil.rmtree(next((folder / "run" / f"step-{step:08d}").glob("data-*")))
    with (
        ce.Checkpointer(folder / "run") as checkpointer,
        pytest.raises(CheckpointDamagedError, match=r"no checkpoint is complete.*step-00000020.*step-00000010"),
    ):
        checkpointer.restore(blank())
