import json
from pathlib import Path

import numpy as np
import pytest
from cli_run import Call, state

ARCHIVE = "step-00000020/data-*/rank-00000.zarr.zip"


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_a_whole_run_verifies(run: Path, call: Call) -> None:
    result = call("verify", run)
    assert result.exit_code == 0
    assert "no damage" in result.stdout


def test_all_bytes_of_all_checkpoints_of_a_run_are_read(run: Path, call: Call) -> None:
    report = json.loads(call("verify", run, "--json").stdout)
    assert report["problems"] == []
    assert report["verified_nbytes"] >= sum(path.stat().st_size for path in run.glob("step-*/data-*/*.zip"))


def test_a_flipped_byte_is_named_with_file_place_and_leaf(run: Path, call: Call) -> None:
    (archive,) = run.glob(ARCHIVE)
    weight = state(20)["model"]["weight"]  # type: ignore[index]
    position = archive.read_bytes().index(np.ascontiguousarray(weight).tobytes()) + 60_000
    flip(archive, position)
    result = call("verify", run / "step-20")
    assert result.exit_code == 1
    assert "rank-00000.zarr.zip" in result.stdout
    (problem,) = json.loads(call("verify", run / "step-20", "--json").stdout)["problems"]
    assert problem["position"] <= position < problem["position"] + problem["nbytes"]
    assert "model.weight" in problem["leaves"]
    assert call("verify", run / "step-10").exit_code == 0


def test_damage_of_one_checkpoint_is_found_when_the_run_is_verified(run: Path, call: Call) -> None:
    (archive,) = run.glob(ARCHIVE)
    flip(archive, 5000)
    result = call("verify", run)
    assert result.exit_code == 1
    assert "step-00000020" in result.stdout


def test_damaged_blocks_are_all_reported_and_neighbours_joined(run: Path, call: Call) -> None:
    (archive,) = run.glob(ARCHIVE)
    assert archive.stat().st_size > 3 * 65536
    for position in (10, 150_000):
        flip(archive, position)
    problems = json.loads(call("verify", run / "step-20", "--json").stdout)["problems"]
    assert [(problem["position"], problem["nbytes"]) for problem in problems] == [(0, 65536), (131072, 65536)]
    flip(archive, 70_000)
    (problem,) = json.loads(call("verify", run / "step-20", "--json").stdout)["problems"]
    assert (problem["position"], problem["nbytes"]) == (0, 3 * 65536)


@pytest.mark.parametrize("name", ["rank-00000.zarr.zip", "layout.zarr.zip"])
def test_every_byte_counts(run: Path, call: Call, name: str) -> None:
    (path,) = run.glob(f"step-00000020/data-*/{name}")
    size = path.stat().st_size
    positions = [0, 1, size - 1, *np.random.default_rng(0).integers(size, size=20).tolist()]
    for position in positions:
        flip(path, position)
        assert call("verify", run / "step-20").exit_code == 1, f"byte {position} of {size} may be flipped"
        flip(path, position)
    assert call("verify", run / "step-20").exit_code == 0


@pytest.mark.parametrize("name", ["rank-00000.zarr.zip", "layout.zarr.zip"])
def test_truncated_and_missing_files_are_named(run: Path, call: Call, name: str) -> None:
    (path,) = run.glob(f"step-00000020/data-*/{name}")
    path.write_bytes(path.read_bytes()[:-4096])
    result = call("verify", run / "step-20")
    assert result.exit_code == 1
    assert name in result.stdout
    path.unlink()
    result = call("verify", run / "step-20")
    assert result.exit_code == 1
    assert name in result.stdout


def test_a_damaged_manifest_is_damage(run: Path, call: Call) -> None:
    manifest = run / "step-00000020" / "manifest-0001.json"
    manifest.write_text(manifest.read_text().replace('"step"', '"stap"'))
    result = call("verify", run)
    assert result.exit_code == 1
    assert "manifest-0001.json" in result.stdout


def test_nothing_there_is_an_error_of_its_own(tmp_path: Path, call: Call) -> None:
    assert call("verify", tmp_path / "nothing").exit_code == 2
    assert call("verify").exit_code == 2
