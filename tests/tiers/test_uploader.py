"""Two ranks move a checkpoint, whatever fails on the way of their messages and their bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptengine.catalog.listing import committed, newest, read_manifest
from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.errors import CheckpointError
from ckptengine.storage.local import LocalStorage
from ckptengine.tiers import uploader
from ckptengine.tiers.overlay import Overlay
from ckptengine.tiers.uploader import Upload, Uploader


class Flaky(MemoryStore):
    """A store of which every other call fails, until it is mended."""

    calls, mended = 0, False

    def _fail(self) -> None:
        self.calls += 1
        if self.calls % 2 and not self.mended:
            raise CheckpointError("the store does not answer")

    def set(self, key: str, value: bytes) -> None:
        self._fail()
        super().set(key, value)

    def get(self, key: str, timeout: float) -> bytes | None:
        self._fail()
        return super().get(key, timeout)


Start = Callable[..., list[Uploader]]


@pytest.fixture
def start(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start two uploaders from the trained run to `tmp_path / "persistent"`, and end them."""
    monkeypatch.setattr(uploader, "_RETRY_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(uploader, "_LOOK_SECONDS", 0.01)
    uploaders: list[Uploader] = []

    def start(store: MemoryStore, released: Callable[[], None] = lambda: None) -> list[Uploader]:
        persistent = LocalStorage(tmp_path / "persistent")
        persistent.create()
        for rank in range(2):
            comm = SimpleNamespace(rank=rank, world_size=2)
            source = Overlay([LocalStorage(trained_run)])
            args = source, persistent, comm, store, "token", lambda upload: None, released, [1], lambda: 1, None
            uploaders.append(Uploader(*args))
        return uploaders

    yield start
    for one in uploaders:
        one.stop()
        assert not one._thread.is_alive()


def newest_of(run: Path) -> Upload:
    storage = LocalStorage(run)
    entry = newest(storage)
    assert entry is not None
    manifest = read_manifest(storage, entry)
    holder = {record.name: number % 2 for number, record in enumerate(manifest.archives)}
    return Upload(entry.directory, manifest, holder | {manifest.layout.name: 0})


def wait_until_there(leader: Uploader, persistent: Path) -> None:
    end = time.monotonic() + 60
    while not leader.settle(0.5, lambda nbytes: None):
        assert time.monotonic() < end, leader.still(0)
    assert len(committed(LocalStorage(persistent))) == 1


def test_messages_that_can_not_be_left_or_read_are_tried_again(start, trained_run, tmp_path):
    store = Flaky()
    leader, _ = start(store)
    leader.offer(newest_of(trained_run))
    wait_until_there(leader, tmp_path / "persistent")
    store.mended = True


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_any_kind_on_any_rank_is_told_and_the_move_tried_again(
    start, trained_run, tmp_path, monkeypatch, caplog, rank
):
    copy, failed = uploader.copy_archive, []

    def failing(source, target, name, record, **more):
        if name.endswith(f"rank-0000{rank}.zarr.zip") and not failed:
            failed.append(name)
            raise MemoryError("no memory")
        return copy(source, target, name, record, **more)

    monkeypatch.setattr(uploader, "copy_archive", failing)
    leader, _ = start(MemoryStore())
    leader.offer(newest_of(trained_run))
    wait_until_there(leader, tmp_path / "persistent")
    assert f"tried again: rank {rank}: no memory" in caplog.text


def test_a_node_deletes_nothing_of_an_upload_before_all_ranks_have_done_their_parts(
    start, trained_run, tmp_path, monkeypatch
):
    copy, seen, over = uploader.copy_archive, [], threading.Event()
    upload = newest_of(trained_run)

    def slow(source, target, name, record, **more):
        if name.endswith("rank-00000.zarr.zip"):
            end = time.monotonic() + 60
            while store.get(f"ckptengine/move/token/{leader._number}/done/1", 0.01) is None:
                assert time.monotonic() < end
            seen.append(follower.protected)
        return copy(source, target, name, record, **more)

    def released():
        seen.append(follower.protected)
        over.set()

    monkeypatch.setattr(uploader, "copy_archive", slow)
    store = MemoryStore()
    leader, follower = start(store, released)
    leader.offer(upload)
    wait_until_there(leader, tmp_path / "persistent")
    assert over.wait(60)
    assert seen == [{upload.manifest.attempt}, set()]


def test_what_goes_wrong_in_an_upload_is_no_word_that_it_is_there(start, trained_run, tmp_path, monkeypatch):
    copy, tries, released = uploader.copy_archive, [], threading.Event()

    def failing(source, target, name, record, **more):
        if name.endswith("rank-00001.zarr.zip"):
            tries.append(released.is_set())
            if len(tries) < 3:
                raise MemoryError("no memory")
        return copy(source, target, name, record, **more)

    monkeypatch.setattr(uploader, "copy_archive", failing)
    leader, _ = start(MemoryStore(), released.set)
    leader.offer(newest_of(trained_run))
    wait_until_there(leader, tmp_path / "persistent")
    assert released.wait(60)
    assert tries == [False, False, False]


def test_rank_0_hears_that_another_ranks_part_goes_on(start, trained_run, tmp_path, monkeypatch):
    copy = uploader.copy_archive
    heard: list[float] = []

    def slow(source, target, name, record, **more):
        if name.endswith("rank-00001.zarr.zip"):
            began = leader._progressed
            end = time.monotonic() + 60
            while leader._progressed == began:
                assert time.monotonic() < end
                time.sleep(0.01)
                more["progress"](0)
            heard.append(leader._progressed)
        return copy(source, target, name, record, **more)

    monkeypatch.setattr(uploader, "_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(uploader, "copy_archive", slow)
    leader, _ = start(MemoryStore())
    leader.offer(newest_of(trained_run))
    wait_until_there(leader, tmp_path / "persistent")
    assert heard


def test_an_end_while_ranks_wait_for_each_other_is_taken_for_no_ranks_word(
    start, trained_run, tmp_path, monkeypatch, caplog
):
    copy, released = uploader.copy_archive, threading.Event()

    def held(source, target, name, record, **more):
        if name.endswith("rank-00001.zarr.zip"):
            released.wait(60)
        return copy(source, target, name, record, **more)

    monkeypatch.setattr(uploader, "copy_archive", held)
    leader, follower = start(MemoryStore())
    leader.offer(newest_of(trained_run))
    end = time.monotonic() + 60
    while "done/1" not in leader._awaited:
        assert time.monotonic() < end
        time.sleep(0.01)
    leader.stop()
    released.set()
    while follower._number < 2:  # it waits for the next upload
        assert time.monotonic() < end
        time.sleep(0.01)
    follower.stop()
    assert not caplog.text
    assert not committed(LocalStorage(tmp_path / "persistent"))
