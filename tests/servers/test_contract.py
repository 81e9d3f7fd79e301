"""What every storage promises, kept on each store."""

from __future__ import annotations

import pytest
from contract import StorageContract

from ckptengine.storage.base import Storage


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, place) -> Storage:
        return place.storage()

    @pytest.fixture
    def second(self, storage, place) -> Storage:
        return place.storage()

    def test_whether_the_store_decides_is_found_out(self, storage, place):
        assert storage._can_create() == place.decides
        assert storage.list() == []
