"""The layout file at a scale where its size per chunk and what a reader touches of it show."""

import json
import zipfile

import numpy as np
import pytest

from ckptengine.archive import layout_file
from ckptengine.archive.layout_file import LAYOUT_NAME, encode_layout, open_layout
from ckptengine.archive.reader import Archive
from ckptengine.layout.merge import merge
from ckptengine.layout.rank_rows import RankRows
from ckptengine.layout.read_plan import WantedPart, plan_read
from ckptengine.schema.box import Box
from ckptengine.schema.head import LeafLayout
from ckptengine.schema.leaf import Placement
from ckptengine.storage.local import LocalStorage

RANKS, LEAVES = 1000, 100
NONE = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def table():
    """Rows of a model that is cut along dimension 0 over all ranks; names of entries grow with the rank's digits."""
    leaves = tuple(
        LeafLayout(("model", f"h.{n}.w"), "float32", (RANKS, 64), Placement.SHARDED, "torch", (1, 64))
        for n in range(LEAVES)
    )
    return merge(
        [
            RankRows(
                rank,
                leaves,
                np.ones(LEAVES, np.int64),
                np.arange(LEAVES) * (400 + len(str(rank))),
                np.full(LEAVES, rank),
                NONE,
                NONE,
            )
            for rank in range(RANKS)
        ]
    )


@pytest.fixture
def rows(table, tmp_path):
    data, record = encode_layout(table)
    (tmp_path / LAYOUT_NAME).write_bytes(data)
    return open_layout(LocalStorage(tmp_path), LAYOUT_NAME, record, [1 << 20] * RANKS)


def test_a_regular_layout_takes_far_less_than_four_bytes_per_chunk(table):
    assert len(encode_layout(table)[0]) < 0.5 * RANKS * LEAVES


def test_a_layout_without_any_order_takes_at_most_eight_bytes_per_chunk(table):
    rng = np.random.default_rng(0)
    table = layout_file.RowTable(
        table.leaves,
        rng.integers(0, RANKS, table.archive.size).astype(np.int32),
        rng.integers(0, 1 << 30, table.archive.size),
        NONE,
        NONE,
    )
    assert len(encode_layout(table)[0]) < 8 * RANKS * LEAVES


def test_a_reader_of_one_cell_of_each_leaf_fetches_the_chunks_of_these_rows_once(rows, monkeypatch):
    fetched = []
    original = Archive.gather
    monkeypatch.setattr(Archive, "gather", lambda self, p, s: fetched.append(p.size) or original(self, p, s))
    plan = plan_read(rows, [WantedPart(leaf, Box((7, 0), (1, 64))) for leaf in range(LEAVES)])
    assert [copy.position for copy in plan[7]] == [leaf * 401 for leaf in range(LEAVES)]
    chunks = -(-RANKS * LEAVES // layout_file.CHUNK_ROWS)
    assert fetched == [chunks, chunks]


def test_a_reader_of_one_leaf_fetches_one_chunk_of_archives_and_one_of_positions(rows, monkeypatch):
    fetched = []
    original = Archive.gather
    monkeypatch.setattr(Archive, "gather", lambda self, p, s: fetched.append(p.size) or original(self, p, s))
    plan_read(rows, [WantedPart(40, Box((7, 3), (80, 1)))])
    assert fetched == [1, 1]


def test_a_small_file_is_read_once(table, tmp_path, monkeypatch):
    loads = []
    original = Archive.load
    monkeypatch.setattr(Archive, "load", lambda self, *tables: loads.append(tables[0]) or original(self, *tables))
    data, record = encode_layout(table)
    (tmp_path / LAYOUT_NAME).write_bytes(data)
    rows = open_layout(LocalStorage(tmp_path), LAYOUT_NAME, record, [1 << 20] * RANKS)
    plan_read(rows, [WantedPart(leaf, Box((7, 0), (1, 64))) for leaf in range(LEAVES)])
    assert [ranges.tolist() for ranges in loads] == [[[0, record.tail_position]]]


def test_a_large_file_is_read_in_part(table, tmp_path, monkeypatch):
    monkeypatch.setattr(layout_file, "_WHOLE_NBYTES", 0)
    rng = np.random.default_rng(0)
    position = rng.integers(0, 1 << 19, table.archive.size)
    data, record = encode_layout(layout_file.RowTable(table.leaves, table.archive, position, NONE, NONE))
    (tmp_path / LAYOUT_NAME).write_bytes(data)
    rows = open_layout(LocalStorage(tmp_path), LAYOUT_NAME, record, [1 << 20] * RANKS)
    read = []
    original = Archive.load
    monkeypatch.setattr(Archive, "load", lambda self, *t: read.append(int(t[0][:, 1].sum())) or original(self, *t))
    (copy,) = plan_read(rows, [WantedPart(40, Box((7, 3), (1, 1)))])[7]
    assert copy.position == position[40 * RANKS + 7]
    assert sum(read) <= 3 * 65536 < record.tail_position


def test_all_rows_can_be_checked(rows, table):
    rows.check()
    archive, position, nbytes = rows.places_of(99)
    assert archive.tolist() == list(range(RANKS))
    assert position.tolist() == table.position[99 * RANKS :].tolist()
    assert set(nbytes.tolist()) == {256}


def test_the_columns_are_what_the_format_says(table, tmp_path):
    """Read with zarr-python, from docs/format.md alone."""
    zarr = pytest.importorskip("zarr")
    (tmp_path / LAYOUT_NAME).write_bytes(encode_layout(table)[0])
    with zipfile.ZipFile(tmp_path / LAYOUT_NAME) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "hierarchy")
    columns = zarr.open_group(tmp_path / "hierarchy" / "layout", mode="r")
    leaves = json.loads(columns["leaves"][:].tobytes())
    assert [leaf["rows"] for leaf in leaves] == [[n * RANKS, (n + 1) * RANKS] for n in range(LEAVES)]
    for name in ("archive", "position"):
        stored, (chunk,) = columns[name][:].astype(np.int64), columns[name].chunks
        values = [stored[start : start + chunk].cumsum() for start in range(0, stored.size, chunk)]
        assert np.concatenate(values).tolist() == getattr(table, name).tolist()
    assert columns["offsets"].shape == columns["lengths"].shape == (0,)
