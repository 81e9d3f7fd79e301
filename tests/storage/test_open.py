"""What users may write for a location."""

import pytest

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


def test_other_urls_are_refused_without_their_credentials():
    with pytest.raises(StorageError, match="s3:// locations are not supported") as caught:
        open_storage("s3://user:secret@bucket/run?token=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("location", ["", "a\0b", "file://host/run", "file://"])
def test_what_is_no_path_is_refused(location):
    with pytest.raises(StorageError):
        open_storage(location)


def test_names_are_joined_without_the_root():
    assert join("", "a", "", "b") == "a/b"
    assert join("") == ""
