"""What users may write for a location."""

import os
from pathlib import Path

import pytest

import ckptengine as ce
import ckptengine.inspect
import ckptengine.zarr
from ckptengine.errors import StorageError
from ckptengine.storage.base import join
from ckptengine.storage.open import open_storage


def test_paths_and_file_urls_are_directories(tmp_path):
    assert open_storage(tmp_path).location() == str(tmp_path)
    assert open_storage(f"{tmp_path}/a b").location("x") == f"{tmp_path}/a b/x"
    assert open_storage(f"file://{tmp_path}/a%20b").location() == f"{tmp_path}/a b"
    assert open_storage(f"file://localhost{tmp_path}").location() == str(tmp_path)


def test_nothing_is_touched_by_opening(tmp_path):
    open_storage(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["s3://user:secret@bucket/run", "s3://bucket/run?token=secret", "s3://b#secret"])
def test_locations_with_credentials_are_refused_and_not_repeated(location):
    with pytest.raises(StorageError, match="s3://.*: a location holds no .*credentials") as caught:
        open_storage(location)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("sign", ["?", "#"])
def test_a_name_with_a_sign_that_urls_use_is_named_up_to_there(sign):
    with pytest.raises(StorageError, match=rf"s3://bucket/runs/lr goes on with '\{sign}'"):
        open_storage(f"s3://bucket/runs/lr{sign}1")


@pytest.mark.parametrize(
    ("location", "part"),
    [
        ("simplecache::s3://bucket/run", "simplecache:: keeps copies"),
        ("zip::s3://bucket/run.zip", "zip:: is an archive"),
        ("zip://run::s3://bucket/run.zip", "zip://…:: in a chain"),
    ],
)
def test_the_part_of_a_chain_that_makes_no_sense_is_named(location, part):
    with pytest.raises(StorageError, match=part):
        open_storage(location)


def test_absolute_paths_stay_absolute(tmp_path):
    assert open_storage(f"local://{tmp_path}/run").location() == f"{tmp_path}/run"
    assert open_storage("hdfs:///user/run/").location() == "hdfs:///user/run"
    assert open_storage("hdfs://name:8020/user/run").location() == "hdfs://name:8020/user/run"


def test_opening_a_url_imports_and_reaches_nothing():
    storage = open_storage("s3://bucket/run/", {"key": "k", "secret": "hidden"})
    assert storage.location("x") == "s3://bucket/run/x"
    assert "hidden" not in repr(storage)


def test_options_are_for_urls():
    with pytest.raises(ValueError, match="storage_options are for URLs"):
        open_storage("run", {"key": "k"})


@pytest.mark.parametrize(
    "location", ["s3://", "s3://bucket//run", "s3://bucket/../run", "simplecache::s3://bucket/run"]
)
def test_urls_that_name_no_place_are_refused(location):
    with pytest.raises(StorageError):
        open_storage(location)


@pytest.mark.parametrize("location", ["", "a\0b", "file://host/run", "file://"])
def test_what_is_no_path_is_refused(location):
    with pytest.raises(StorageError):
        open_storage(location)


def test_names_are_joined_without_the_root():
    assert join("", "a", "", "b") == "a/b"
    assert join("") == ""


@pytest.mark.parametrize(
    ("location", "url"),
    [
        (Path("s3://bucket/run"), "s3://bucket/run"),
        (Path("obs://bucket/run"), "obs://bucket/run"),
        (Path("file:///data/run"), "file:///data/run"),
        (Path("/home/me/gs:/bucket/run"), "gs://bucket/run"),
        (os.path.realpath("s3://bucket/run"), "s3://bucket/run"),
    ],
)
def test_a_url_that_a_path_has_taken_a_slash_from_is_refused_and_the_url_is_named(location, url):
    with pytest.raises(StorageError, match=f"lost a slash.*'{url}'"):
        open_storage(location)


def test_a_url_that_has_lost_a_slash_is_refused_by_every_call_and_leaves_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lost, state = Path("s3://bucket/run"), {"step": 1}
    for call in (
        lambda: ce.save(lost, state),
        lambda: ce.async_save(lost, state),
        lambda: ce.load(lost),
        lambda: ce.load(lost, into=state),
        lambda: ce.Checkpointer(lost),
        lambda: ce.Checkpointer("run", local=lost),
        lambda: ce.Checkpointer("run", memory=lost),
        lambda: ce.Checkpointer("run", preemption=ce.Preemption(file=lost)),
        lambda: ckptengine.inspect.describe(lost),
        lambda: ckptengine.zarr.open(lost),
    ):
        with pytest.raises(StorageError, match="lost a slash"):
            call()
    assert not (tmp_path / "s3:").exists()


def test_colons_in_names_are_nothing_special(tmp_path):
    for name in ("a:b", "12:30", "run:", "x/c:/d"):
        assert open_storage(tmp_path / name).location() == str(tmp_path / name)
