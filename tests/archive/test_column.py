import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptengine._native as _native
from ckptengine.archive.column import Column, encode_column, open_column
from ckptengine.archive.directory import read_directory
from ckptengine.archive.image import BLOCK_NBYTES, plan_entries
from ckptengine.archive.reader import Archive, open_archive
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.tail import build_tail
from ckptengine.storage.local import LocalStorage


def opened(root, values, chunk_items, *, differences):
    """Write a column into an archive of its own and open it."""
    metadata, data = encode_column(values, chunk_items, differences=differences)
    image = plan_entries("x.zarr.zip", [("layout/c/zarr.json", metadata), ("layout/c/c/0", data)])
    fixed = b"".join(part for _, part in image.static)
    blocks = [_native.crc32(fixed[start : start + BLOCK_NBYTES]) for start in range(0, len(fixed), BLOCK_NBYTES)]
    tail = build_tail(image, [], np.zeros(0, np.uint32), np.array(blocks, np.uint32))
    (root / image.name).write_bytes(fixed + tail)
    record = ArchiveRecord(image.name, len(fixed) + len(tail), len(fixed), _sha256(tail))
    archive = open_archive(LocalStorage(root), image.name, record)
    return open_column(archive, read_directory(archive), "c", values.dtype.name, differences=differences)


def _sha256(data):
    import hashlib

    return hashlib.sha256(data).hexdigest()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from(["int32", "int64"]), st.integers(1, 9))
def test_values_come_back_from_any_places(tmp_path_factory, data, differences, dtype, chunk_items):
    small = 1 << 30 if dtype == "int32" else 1 << 62
    values = np.array(data.draw(st.lists(st.integers(0, small), max_size=40)), dtype)
    column = opened(tmp_path_factory.mktemp("column"), values, chunk_items, differences=differences)
    assert column.size == values.size
    wanted = st.lists(st.integers(0, max(0, values.size - 1)), max_size=30 if values.size else 0)
    places = np.array(data.draw(wanted), np.int64)
    assert column.take(places).tolist() == values[places].tolist()


@pytest.fixture
def long_column(tmp_path):
    rng = np.random.default_rng(1)
    return opened(tmp_path, rng.integers(0, 1 << 40, 100_000), 1000, differences=True)


def test_only_the_chunks_of_wanted_places_are_read(long_column, monkeypatch):
    gathered = []
    original = Archive.gather

    def noted(self, positions, sizes):
        gathered.append((positions.tolist(), sizes.tolist()))
        return original(self, positions, sizes)

    monkeypatch.setattr(Archive, "gather", noted)
    long_column.take(np.array([99_999, 5_001, 5_999, 0]))
    chunks = [0, 5, 99]
    assert gathered == [(long_column.starts[chunks].tolist(), long_column.sizes[chunks].tolist())]


def test_compressed_bytes_are_fetched_in_bounded_batches(long_column, monkeypatch):
    monkeypatch.setattr("ckptengine.archive.column._BATCH_NBYTES", 20_000)
    sizes = []
    original = Archive.gather
    monkeypatch.setattr(Archive, "gather", lambda self, p, s: sizes.append(int(s.sum())) or original(self, p, s))
    everything = long_column.take(np.arange(100_000))
    assert len(sizes) > 10
    assert max(sizes) < 30_000
    assert everything[:3].tolist() == np.random.default_rng(1).integers(0, 1 << 40, 100_000)[:3].tolist()


def test_steps_that_repeat_take_next_to_nothing():
    ranks = np.tile(np.arange(4096, dtype=np.int32), 50)
    assert len(encode_column(ranks, 4096, differences=True)[1]) < 0.02 * ranks.size
    assert len(encode_column(ranks, 4096, differences=False)[1]) > ranks.size


def test_a_column_is_a_zarr_array(tmp_path):
    zarr = pytest.importorskip("zarr")
    values = np.arange(10, dtype=np.int64) ** 3
    metadata, data = encode_column(values, 4, differences=False)
    (tmp_path / "c" / "c").mkdir(parents=True)
    (tmp_path / "c" / "zarr.json").write_bytes(metadata)
    (tmp_path / "c" / "c" / "0").write_bytes(data)
    assert zarr.open_array(tmp_path / "c", mode="r")[:].tolist() == values.tolist()


def test_a_column_without_values_is_one(tmp_path):
    column = opened(tmp_path, np.zeros(0, np.int64), 10, differences=True)
    assert isinstance(column, Column)
    assert column.take(np.zeros(0, np.int64)).tolist() == []
