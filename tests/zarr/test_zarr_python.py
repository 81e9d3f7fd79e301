"""Checkpoints read by zarr-python's own stores."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import three_ranks
import zarr
from leaves import check, check_all
from zarr.dtype import data_type_registry
from zarr.storage import LocalStore, ZipStore

import ckptengine.zarr  # noqa: F401, makes bfloat16 known

# zarr warns of members of a group that it doesn't recognize.
pytestmark = pytest.mark.filterwarnings("error")


def test_each_archive_is_a_hierarchy_of_its_own(archives: list[Path]) -> None:
    expected = three_ranks.shared() | {f"ranks/{rank:05d}/rng": three_ranks.own(rank) for rank in range(3)}
    whole = set()
    for archive in archives:
        with ZipStore(archive, mode="r") as store:
            group = zarr.open_group(store, mode="r")
            members = dict(group.members(max_depth=None))
            assert f"checksums/{archive.name.removesuffix('.zarr.zip')}" in members
            for node, member in members.items():
                if node in expected and isinstance(member, zarr.Array) and member.nchunks_initialized == member.nchunks:
                    check(member[...], expected[node], node)
                    whole.add(node)
    split = {f"state/model/{name}" for name in ("h.0.weight", "h.0.columns", "large", "fragments", "pieces")}
    assert whole == set(expected) - split


def test_an_archive_has_its_own_chunks_and_fill_values_elsewhere(archives: list[Path]) -> None:
    weight = three_ranks.shared()["state/model/h.0.weight"]
    for rank, archive in enumerate(archives):
        with ZipStore(archive, mode="r") as store:
            array = zarr.open_array(store, path="state/model/h.0.weight", mode="r")
            rows = slice(4 * rank, 4 * rank + 4)
            assert array[rows].tobytes() == weight[rows].tobytes()
            assert (array[...] != array[...]).sum() == weight.size - weight[rows].size


@pytest.mark.parametrize("tool", ["zipfile", "unzip"])
def test_all_archives_unzipped_into_one_directory_are_one_hierarchy(
    checkpoint: Path, tmp_path: Path, tool: str
) -> None:
    if tool == "unzip" and shutil.which(tool) is None:
        pytest.skip("there is no unzip on this machine")
    for archive in checkpoint.glob("data-*/*.zarr.zip"):
        if tool == "unzip":
            subprocess.run(["unzip", "-qo", archive, "-d", tmp_path], check=True)
        else:
            with zipfile.ZipFile(archive) as content:
                content.extractall(tmp_path)
    group = zarr.open_group(LocalStore(tmp_path, read_only=True), mode="r")
    members = dict(group.members(max_depth=None))
    assert {"objects", "layout/position", "checksums/rank-00002", "checksums/layout", "ranks/00001/rng"} <= set(members)
    check_all(group)


LIST_WITHOUT = """
import sys, zarr
try:
    zarr.open_group(zarr.storage.ZipStore(sys.argv[1], mode="r"), mode="r")["state/model"].members()
except ValueError as error:
    print(error)
"""


def test_without_our_plug_in_only_groups_that_hold_bfloat16_cannot_be_listed(
    archives: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(data_type_registry.contents, "bfloat16")
    with ZipStore(archives[1], mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert set(dict(group["state/items"].members())) == {"#0"}
        check(group["state/model/fp8"][...], three_ranks.shared()["state/model/fp8"], "fp8")
        with pytest.raises(ValueError, match="bfloat16"):
            group["state/model/h.0.bias"]
    # In a process of its own: what zarr leaves behind of a failed listing is written to stderr at its end.
    listing = subprocess.run([sys.executable, "-c", LIST_WITHOUT, archives[1]], capture_output=True, text=True)
    assert "bfloat16" in listing.stdout
