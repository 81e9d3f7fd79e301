"""A disturbed network in front of the stores that speak HTTP."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from servers import Proxy

import ckptengine as ce


@pytest.fixture(params=["s3", "gs", "abfs"])
def kind(request):
    return request.param


@pytest.fixture
def proxy(place):
    proxy = Proxy(place.port)
    yield proxy
    proxy.close()


@pytest.fixture
def disturbed(place, proxy):
    def through(value):
        return value.replace(f"127.0.0.1:{place.port}", f"127.0.0.1:{proxy.port}") if isinstance(value, str) else value

    return replace(place, options={name: through(value) for name, value in place.options.items()}, port=proxy.port)


STATE = {"w": np.random.default_rng(3).standard_normal(1_500_000)}


@pytest.mark.parametrize("fault", ["503 SlowDown", "reset before"])
def test_a_save_survives_faults_in_its_requests(place, disturbed, proxy, fault):
    faults = [proxy.fault(fault, pattern) for pattern in ("(PUT|POST) .*manifest|POST .*upload", "GET ")]
    ce.save(disturbed.url, STATE, storage_options=disturbed.options)
    assert any(one.done for one in faults)
    assert (ce.load(place.url, storage_options=place.options)["w"] == STATE["w"]).all()


def test_a_load_survives_faults_in_its_requests(place, disturbed, proxy):
    ce.save(place.url, STATE, storage_options=place.options)
    faults = [proxy.fault(kind, "GET ", 2) for kind in ("503 SlowDown", "reset before")]
    assert (ce.load(disturbed.url, storage_options=disturbed.options)["w"] == STATE["w"]).all()
    assert all(one.done == 2 for one in faults)


def test_a_publication_whose_reply_is_lost_is_found_to_be_ours(disturbed, proxy, place):
    storage = disturbed.storage()
    storage.create()
    proxy.fault("reset after", "(PUT|POST) .*m1|POST .*name=.*m1|POST .*/o[?]")
    assert storage.put_if_absent("m1", b"ours")
    assert place.storage().read_bytes("m1", 9) == b"ours"
