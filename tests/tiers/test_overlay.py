"""Several tiers read as one: what a storage promises to a reader holds whichever tier has the file."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from contract import ReadingContract

from ckptengine.storage.base import Storage
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.remote import RemoteStorage
from ckptengine.tiers.overlay import Overlay


@pytest.fixture
def tiers(tmp_path: Path) -> list[Storage]:
    """Return two directories and a store of objects, the fastest first."""
    store = RemoteStorage(f"memory://{uuid.uuid4().hex}/run")
    return [LocalStorage(tmp_path / "memory"), LocalStorage(tmp_path / "local"), store]


class TestContract(ReadingContract):
    @pytest.fixture(params=[0, 1, 2], ids=["memory", "local", "run"])
    def storage(self, request: pytest.FixtureRequest, tiers: list[Storage]) -> Storage:
        return tiers[request.param]

    @pytest.fixture
    def view(self, storage: Storage, tiers: list[Storage]) -> Overlay:
        return Overlay(tiers)


def test_a_file_is_read_from_the_fastest_tier_that_has_it(tiers: list[Storage]) -> None:
    for number, tier in enumerate(tiers):
        tier.write_bytes(f"in-{number}", b"1")
        tier.write_bytes("in-all", b"%d" % number)
    overlay = Overlay(tiers)
    assert overlay.read_bytes("in-all", 9) == b"0"
    assert [overlay.location(f"in-{number}") for number in range(3)] == [
        tier.location(f"in-{number}") for number, tier in enumerate(tiers)
    ]
    assert overlay.list() == ["in-0", "in-1", "in-2", "in-all"]
    tiers[0].delete("in-all")
    overlay.forget()
    assert overlay.read_range("in-all", 0, 1) == b"1"
