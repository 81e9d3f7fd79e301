"""Every URL that fsspec opens is the place that it says: hosts, accounts, absolute paths, chains."""

from __future__ import annotations

import sys
import types
import uuid

import fsspec
import numpy as np
import pytest
from file_systems import Hosted
from fsspec.registry import _registry

import ckptengine as ce
from ckptengine.errors import StorageError
from ckptengine.storage.open import open_storage


@pytest.fixture
def hosted(tmp_path, monkeypatch):
    monkeypatch.setattr(Hosted, "root", str(tmp_path))
    monkeypatch.setattr(Hosted, "opened", [])
    for protocol in ("hdfs", "smb"):
        monkeypatch.setitem(_registry, protocol, Hosted)
    return tmp_path


def train(url: str) -> None:
    with ce.Checkpointer(url, every=1, keep_last=1) as ckpt:
        for step in (1, 2, 3):
            ckpt.step(step, {"w": np.full(1000, step)})


@pytest.mark.parametrize("url", ["hdfs:///user/me/run", "smb://me@server:445/share/run"])
def test_the_host_is_asked_and_directories_are_made_and_removed(hosted, url):
    train(url)
    assert ce.load(url)["w"][0] == 3
    host = {"username": "me", "host": "server", "port": 445} if "@" in url else {}
    assert Hosted.opened[0] == host
    (run,) = hosted.rglob("run")
    assert run == hosted / ("user/me/run" if "hdfs" in url else "share/run")
    assert [path.name for path in run.iterdir() if path.name.startswith("step-")] == ["step-00000003"]
    assert list(run.rglob(".tmp-*")) == []


def test_a_directory_that_another_process_has_removed_is_made_again(hosted):
    storage = open_storage("hdfs:///user/run")
    storage.write_bytes("a/x", b"1")
    (hosted / "user/run/a/x").unlink()
    (hosted / "user/run/a").rmdir()
    storage.write_bytes("a/y", b"2")
    assert storage.list("a") == ["y"]


def test_the_account_of_an_azure_url_is_the_one_that_is_opened(monkeypatch):
    adlfs = types.ModuleType("adlfs")

    class Azure(fsspec.AbstractFileSystem):
        protocol = "abfs"

        def __init__(self, account_name: str | None = None) -> None:
            super().__init__()
            raise LookupError(account_name)

        @staticmethod
        def _get_kwargs_from_urls(url: str) -> dict[str, str]:
            return {"account_name": url.partition("@")[2].partition(".")[0]}

    adlfs.AzureBlobFileSystem = Azure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adlfs", adlfs)
    seen = []
    monkeypatch.setattr("ckptengine.storage.connect.code_of", lambda error: seen.append(str(error)) or "told")
    with pytest.raises(StorageError, match="can't be opened"):
        open_storage("abfs://data@mine.dfs.core.windows.net/run").list()
    assert seen == ["mine"]


def test_a_chain_that_only_leads_somewhere_works():
    name = uuid.uuid4().hex
    train(f"dir::memory://{name}/run")
    assert ce.load(f"memory://{name}/run")["w"][0] == 3


def test_an_unknown_protocol_is_named():
    with pytest.raises(StorageError, match="does not know the protocol 'nosuch'"):
        ce.load("nosuch://bucket/run")
