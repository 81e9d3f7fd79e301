"""Large reads of gs:// and abfs:// through obstore: the same bytes and errors as through gcsfs and adlfs alone."""

from __future__ import annotations

import errno
import logging

import numpy as np
import pytest
from obstore_reads import counted_reads

import ckptengine as ce
from ckptengine.errors import StorageError

pytest.importorskip("obstore")

STATE = {"w": np.random.default_rng(5).standard_normal(1_500_000), "step": 3}


@pytest.fixture(params=["gs", "abfs"])
def kind(request):
    return request.param


@pytest.fixture
def read(monkeypatch):
    """The reads that obstore has made, as (key, position, bytes)."""
    return counted_reads(monkeypatch)


def test_the_data_of_a_load_comes_through_obstore(place, read, caplog):
    caplog.set_level(logging.INFO, "ckptengine")
    ce.save(place.url, STATE, storage_options=place.options)
    found = ce.load(place.url, storage_options=place.options)
    assert (found["w"] == STATE["w"]).all()
    assert sum(nbytes for _, _, nbytes in read) >= STATE["w"].nbytes
    assert all(key.startswith("runs/gpt/") for key, _, _ in read)
    assert "large reads go through obstore" in caplog.text


def test_what_ends_early_or_is_missing_is_told_as_without_obstore(place):
    storage = place.storage()
    storage.write_bytes("a", bytes(range(200)) * 1000)
    assert bytes(storage._get("a", 100_000, 100_000)) == (bytes(range(200)) * 1000)[100_000:]
    assert bytes(storage._get("a", 150_000, 100_000)) == (bytes(range(200)) * 1000)[150_000:]
    assert bytes(storage._get("a", 300_000, 100_000)) == b""
    with pytest.raises(StorageError) as caught:
        storage.read_range("b", 0, 100_000)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("kind", ["gs"], indirect=True)  # Azure's client takes the proxy itself
def test_a_proxy_in_the_environment_which_obstore_would_take_leaves_the_reads_to_gcsfs(
    place, read, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "ckptengine")
    ce.save(place.url, STATE, storage_options=place.options)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    found = ce.load(place.url, storage_options=place.options)
    assert (found["w"] == STATE["w"]).all()
    assert not read
    assert "obstore does not support a proxy" in caplog.text


def test_what_the_environment_says_of_other_credentials_is_not_taken(place, read, monkeypatch):
    ce.save(place.url, STATE, storage_options=place.options)
    for name in ("AZURE_STORAGE_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL"):
        monkeypatch.setenv(name, "aHR0cDovLzEyNy4wLjAuMTox")
    found = ce.load(place.url, storage_options=place.options)
    assert (found["w"] == STATE["w"]).all()
    assert sum(nbytes for _, _, nbytes in read) >= STATE["w"].nbytes
