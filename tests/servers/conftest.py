"""The stores, started when the first test asks for them. These tests have an environment of their own:
`make test-servers`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

collect_ignore_glob = [] if os.environ.get("CKPTENGINE_TEST_SERVERS") else ["test_*.py"]

KINDS = ["s3", "gs", "abfs", "sftp", "ssh"]


def _server(name: str) -> Callable[..., Any]:
    @pytest.fixture(scope="session", name=f"{name}_port")
    def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
        import stores

        with getattr(stores, name)(tmp_path_factory.mktemp(name)) as port:
            yield port

    return port


gateway_port, google_port, azure_port, ssh_port = map(_server, ("gateway", "google", "azure", "ssh"))


@pytest.fixture
def place(request: pytest.FixtureRequest, kind: str) -> Any:
    """A new place in the store of a kind, which the test's parameters say."""
    import stores

    if kind == "s3":
        return stores.bucket_at(request.getfixturevalue("gateway_port"))
    if kind == "gs":
        return stores.google_place(request.getfixturevalue("google_port"))
    if kind == "abfs":
        return stores.azure_place(request.getfixturevalue("azure_port"))
    if kind == "sftp":
        stores.use_paramiko()
    return stores.ssh_place(request.getfixturevalue("ssh_port"), kind)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
