import pytest

from ckptengine.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path):
    storage = LocalStorage(tmp_path / "run")
    storage.create()
    return storage
