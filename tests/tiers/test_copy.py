"""A committed checkpoint on its way to another storage: whole, verified, or not at all."""

from __future__ import annotations

import errno
import json
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest
from buckets import QUICK, SMALL, Bucket
from tier_files import archive_of, files_of, flip, newest_of, of_step

import ckptengine as ce
from ckptengine.catalog.listing import committed
from ckptengine.errors import CheckpointDamagedError, SaveFailedError, StorageError
from ckptengine.snapshot.arena import Arena
from ckptengine.storage.base import Storage
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.remote import RemoteStorage
from ckptengine.tiers import copy
from ckptengine.tiers.copy import copy_archive, copy_commit
from ckptengine.tiers.pace import Pace


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these small archives take several."""
    monkeypatch.setattr(copy, "WINDOW_NBYTES", 1 << 20)


def storage_of(kind: str, request: pytest.FixtureRequest) -> Storage:
    if kind == "s3":
        return request.getfixturevalue("bucket").storage("target")
    if kind == "memory":
        return RemoteStorage(f"memory://{uuid.uuid4().hex}/run", budget=SMALL, patience=QUICK)
    return LocalStorage(request.getfixturevalue("tmp_path") / "target")


def copy_all(source: Storage, target: Storage) -> None:
    """Copy the newest checkpoint."""
    entry, manifest = newest_of(source)
    for rank in range(manifest.world_size):
        copy_archive(source, target, *archive_of(source, rank))
    copy_commit(source, target, entry.directory, manifest)


@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
def test_a_checkpoint_goes_to_any_storage_and_back_byte_for_byte(run, tmp_path, request, kind):
    between, back = storage_of(kind, request), LocalStorage(tmp_path / "back")
    copy_all(LocalStorage(run), between)
    assert [entry.step for entry in committed(between)] == [30]
    copy_all(between, back)
    assert files_of(tmp_path / "back") == of_step(run, 30)
    assert float(ce.load(tmp_path / "back")["shared"][0]) == 30


def test_every_byte_is_counted_and_reported_once(run, tmp_path):
    source, target, pieces = LocalStorage(run), LocalStorage(tmp_path / "target"), []
    name, record = archive_of(source)
    assert copy_archive(source, target, name, record, progress=pieces.append) == record.nbytes
    assert sum(pieces) == record.nbytes
    assert len(pieces) > 3


def test_what_is_there_is_not_read_again(run, tmp_path):
    source, target, pieces = LocalStorage(run), LocalStorage(tmp_path / "target"), []
    name, record = archive_of(source)
    copy_archive(source, target, name, record)
    (run / name).unlink()
    assert copy_archive(source, target, name, record, progress=pieces.append) == 0
    assert pieces == [record.nbytes]


def test_a_file_of_another_size_is_replaced(run, tmp_path):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    name, record = archive_of(source)
    target.write_bytes(name, b"x" * 5000)
    assert copy_archive(source, target, name, record) == record.nbytes
    assert (tmp_path / "target" / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("place", ["first byte", "second window", "last block", "tail"])
def test_damage_of_the_source_is_named_and_not_spread(run, tmp_path, request, kind, place):
    source, target = LocalStorage(run), storage_of(kind, request)
    name, record = archive_of(source)
    position = {
        "first byte": 0,
        "second window": (1 << 20) + 77,
        "last block": record.tail_position - 1,
        "tail": record.nbytes - 100,
    }[place]
    flip(run / name, position)
    with pytest.raises(CheckpointDamagedError, match=str(run / name)):
        copy_archive(source, target, name, record)
    data = name.rpartition("/")[0]
    assert target.list(data) == target.temporaries(data) == target.unfinished() == []


def test_damage_in_a_store_is_named_and_not_spread(trained_run, bucket, tmp_path):
    source, target = bucket.storage(), LocalStorage(tmp_path / "target")
    copy_all(LocalStorage(trained_run), source)
    name, record = archive_of(source)
    data = bytearray(bucket.fs.cat_file(f"{bucket.url}/run/{name}"))
    data[len(data) // 2] ^= 1
    bucket.fs.pipe_file(f"{bucket.url}/run/{name}", bytes(data))
    with pytest.raises(CheckpointDamagedError, match=rf"s3://.*{name}"):
        copy_archive(source, target, name, record)
    assert files_of(tmp_path / "target") == {}


@pytest.mark.parametrize("kind", ["503 SlowDown", "reset before", "reset after", "truncated", "wrong length"])
def test_a_disturbed_network_costs_tries_and_nothing_else(run, bucket, disturbed, proxy, tmp_path, kind):
    up = [] if kind in ("truncated", "wrong length") else [proxy.fault(kind, p) for p in ("PUT .*rank-0000", "HEAD")]
    copy_all(LocalStorage(run), disturbed.storage())
    down = [proxy.fault(kind, pattern, 2) for pattern in ("GET .*rank-00002", "GET .*layout")]
    copy_all(disturbed.storage(), LocalStorage(tmp_path / "back"))
    assert [fault.done for fault in (*up, *down)] == [fault.times for fault in (*up, *down)]
    assert files_of(tmp_path / "back") == of_step(run, 30)
    assert bucket.uploads() == []


def test_an_archive_is_never_in_memory_as_a_whole(tmp_path, bucket: Bucket, monkeypatch):
    ce.save(tmp_path / "point", {"w": np.random.default_rng(0).standard_normal(4 << 20)})
    source, target = LocalStorage(tmp_path / "point"), bucket.storage("target")
    name, record = archive_of(source)
    asked, reserve = [], Arena.reserve
    monkeypatch.setattr(Arena, "reserve", lambda self, nbytes: (asked.append(nbytes), reserve(self, nbytes))[1])
    copy_archive(source, target, name, record)
    back = LocalStorage(tmp_path / "back")
    tracemalloc.start()
    try:
        copy_archive(target, back, name, record)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert record.nbytes > 32 << 20
    assert asked == [2 << 20] * 2, "two windows"
    assert peak < 8 << 20, "some requests in flight and the tail"


def test_no_memory_for_a_copy_is_told_as_that(run, tmp_path, monkeypatch):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    monkeypatch.setattr("ckptengine.snapshot.arena.available_nbytes", lambda: 4096)
    with pytest.raises(StorageError, match=r"no memory to copy .*rank-00000.*2,097,152 bytes are needed") as caught:
        copy_archive(source, target, *archive_of(source))
    assert caught.value.errno == errno.ENOMEM
    assert files_of(tmp_path / "target") == {}


def test_a_pace_is_kept_for_every_byte_and_can_end_a_copy(run, tmp_path):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    name, record = archive_of(source)
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if target.size("stop") is not None:
            raise InterruptedError

    pace = Pace(1000, clock=lambda: now[0], sleep=sleep)
    copy_archive(source, target, name, record, pace=pace)
    assert now[0] == pytest.approx(record.nbytes / 1000)
    target.delete(name)
    target.write_bytes("stop", b"")
    with pytest.raises(InterruptedError):
        copy_archive(source, target, name, record, pace=pace)
    assert set(files_of(tmp_path / "target")) == {"stop"}


def test_a_commit_that_lacks_a_file_is_refused(run, tmp_path):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    entry, manifest = newest_of(source)
    for rank in (0, 1, 3):
        copy_archive(source, target, *archive_of(source, rank))
    with pytest.raises(SaveFailedError, match=rf"{tmp_path}/target/.*rank-00002.* is missing"):
        copy_commit(source, target, entry.directory, manifest)
    name, record = archive_of(source, 2)
    target.write_bytes(name, b"x" * 4096)
    with pytest.raises(SaveFailedError, match=r"rank-00002.* has 4096 bytes instead of"):
        copy_commit(source, target, entry.directory, manifest)
    assert committed(target) == []
    copy_archive(source, target, name, record)
    copy_commit(source, target, entry.directory, manifest)
    copy_commit(source, target, entry.directory, manifest)
    assert files_of(tmp_path / "target") == of_step(run, 30)


def test_the_manifest_comes_last(run, tmp_path, monkeypatch):
    source, target, written = LocalStorage(run), LocalStorage(tmp_path / "target"), []
    put = LocalStorage.put_if_absent

    def noting(self: LocalStorage, name: str, data: bytes) -> bool:
        written.append((name, sorted(files_of(tmp_path / "target"))))
        return put(self, name, data)

    monkeypatch.setattr(LocalStorage, "put_if_absent", noting)
    copy_all(source, target)
    assert [name for name, _ in written] == ["generation-0001.json", "step-00000030/manifest-0001.json"]
    assert len(written[-1][1]) == len(of_step(run, 30)) - 1


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_another_runs_place_is_refused(run, tmp_path, request, kind):
    other = storage_of(kind, request)
    with ce.Checkpointer(tmp_path / "other", every=1) as ckpt:
        ckpt.save(7, {"w": np.arange(10.0)})
    copy_all(LocalStorage(tmp_path / "other"), other)
    before = sorted(other.list())
    source = LocalStorage(run)
    entry, manifest = newest_of(source)
    with pytest.raises(StorageError, match=r"holds another run than .*give each run a place of its own") as caught:
        copy_commit(source, other, entry.directory, manifest)
    assert caught.value.errno == errno.EEXIST
    assert sorted(other.list()) == before


def test_another_manifest_in_the_place_is_refused(run, tmp_path):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    entry, manifest = newest_of(source)
    for rank in range(manifest.world_size):
        copy_archive(source, target, *archive_of(source, rank))
    target.write_bytes(entry.manifest, b"{}")
    with pytest.raises(StorageError, match=r"manifest-0001.json exists already, and is not .*/run/") as caught:
        copy_commit(source, target, entry.directory, manifest)
    assert caught.value.errno == errno.EEXIST


def test_later_lives_go_where_the_earlier_ones_went(run, tmp_path):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    copy_all(source, target)
    for step in (40, 50):
        state = {"w": np.full(10, float(step))}
        with ce.Checkpointer(run, every=10, preemption=None) as ckpt:
            ckpt.save(step, state)
        copy_all(source, target)
    assert [entry.order for entry in committed(target)] == [(1, 30), (2, 40), (3, 50)]
    assert files_of(tmp_path / "target") == of_step(run, 30, 40, 50)


def test_keys_of_a_manifest_that_this_version_does_not_know_are_kept(run, tmp_path):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    entry, _ = newest_of(source)
    path = run / entry.manifest
    document = json.loads(path.read_bytes())
    path.write_bytes(rewritten(document | {"colour": "blue"}))
    copy_all(source, target)
    assert json.loads((tmp_path / "target" / entry.manifest).read_bytes())["colour"] == "blue"


def rewritten(document: dict) -> bytes:
    import hashlib

    document = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(
        document | {"sha256": hashlib.sha256(text).hexdigest()}, sort_keys=True, separators=(",", ":")
    ).encode()


def test_what_was_never_committed_where_it_lay_is_committed_where_it_goes(run, tmp_path: Path):
    source, target = LocalStorage(run), LocalStorage(tmp_path / "target")
    entry, manifest = newest_of(source)
    archives = [archive_of(source, rank) for rank in range(manifest.world_size)]
    expected = of_step(run, 30)
    (run / entry.manifest).unlink()
    for name, record in archives:
        copy_archive(source, target, name, record)
    copy_commit(source, target, entry.directory, manifest)
    assert files_of(tmp_path / "target") == expected
