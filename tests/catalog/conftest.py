import sys
from pathlib import Path

import pytest

from ckptengine.storage.local import LocalStorage

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def storage(tmp_path):
    storage = LocalStorage(tmp_path / "run")
    storage.create()
    return storage
